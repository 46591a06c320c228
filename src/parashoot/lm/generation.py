"""What `transformers`' `generate` asks of a model whose cache is ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cache import Cache


class StatefulGeneration:
    """Before `GenerationMixin`: the prompt in one parallel pass, then a step a token.

    The library's versions keep the cache as `past_key_values` or as `cache`; both names are understood.
    """

    _is_stateful = True  # no going back to an earlier token, as assisted decoding would

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        given = [model_kwargs.get(name) for name in ("past_key_values", "cache")]
        if given == [None, None] and generation_config.use_cache is not False:
            model_kwargs["cache"] = Cache()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass: the prompt or, after it, what the cache has not seen of `input_ids` (B, T)."""
        past = cache if past_key_values is None else past_key_values
        rest = {"past_key_values": past, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        if inputs_embeds is not None and (past is None or not past.length):
            return {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **rest}
        seen = 0 if past is None else min(past.length, input_ids.shape[1] - 1)
        # Whatever is padding lies in the past after the prompt, and a pass without a mask is the cheaper one.
        stepping = seen and seen == input_ids.shape[1] - 1
        mask = None if stepping or attention_mask is None or bool(attention_mask.all()) else attention_mask
        return {"input_ids": input_ids[:, seen:].contiguous(), "attention_mask": mask, **rest}
