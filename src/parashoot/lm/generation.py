"""What `transformers`' `generate` asks of a model whose cache is ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import bad_value
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
        is_first_iteration: bool | None = None,
        next_sequence_length: int | None = None,
        output_hidden_states: bool | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """The arguments of the next forward pass: what the cache has not seen of the text, whose end `input_ids` or, at first,
        `inputs_embeds` are. How much that is, `attention_mask` (B, T) over the whole text says, or the library where it lets go of
        one that is all true. Raises `ArgumentError` where the cache has seen all, or more is missing than is given.
        """
        past = cache if past_key_values is None else past_key_values
        rest = {"past_key_values": past, "use_cache": use_cache, "logits_to_keep": logits_to_keep}
        if output_hidden_states is not None:
            rest["output_hidden_states"] = output_hidden_states
        seen = 0 if past is None else past.length
        if attention_mask is not None:
            new = attention_mask.shape[1] - seen
        elif next_sequence_length is not None:
            new = next_sequence_length
        else:
            new = input_ids.shape[1] - (0 if is_first_iteration else seen)
        embedded = inputs_embeds is not None and bool(is_first_iteration or not seen or new > input_ids.shape[1])
        given = inputs_embeds if embedded and inputs_embeds is not None else input_ids
        if not 0 < new <= given.shape[1]:
            bad_value(
                "past_key_values", f"a past of {seen} tokens before a text of {seen + new}, and {given.shape[1]} tokens",
                "a past of fewer tokens than the text, and all tokens after it",
                "Give the whole text, or its new tokens with an attention_mask over the whole.",
            )  # fmt: skip
        # Whatever is padding lies in the past after the prompt, and a pass without a mask is the cheaper one.
        stepping = seen and new == 1
        mask = None if stepping or attention_mask is None or bool(attention_mask.all()) else attention_mask
        return {
            "inputs_embeds" if embedded else "input_ids": given[:, -new:].contiguous(),
            "attention_mask": mask,
            **rest,
        }
