"""The model type `parashoot` of lm-evaluation-harness. `python -m parashoot.lm.lm_eval` is its command line with that type known.

It is no `HFLM`: that one needs tokens for padding and for the end of a text, which bytes have not, and cuts texts to a length.
"""

# ruff: noqa: E402
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..errors import bad_value, needs
from .cache import Cache
from .checkpoint import load_model
from .export import text_tokenizer
from .processes import choose_device

needs("evaluation on lm-eval's tasks", "lm-eval", "lm_eval")
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models import utils, utils_hf  # pyright: ignore[reportMissingImports]


@register_model("parashoot")
class ParashootLM(TemplateLM):
    """A run, a checkpoint or an exported directory as a model of lm-eval; texts of any length are read whole.

    - `pretrained`: the directory. `device`: by default a GPU if there is one. `batch_size`: texts side by side.
    - `window`: tokens a pass; the state is carried from one to the next, so it decides about memory alone.
    - `prefix_token_id`: what stands before a text without context; by default the tokenizer's end of text, for bytes a newline.
    - `max_gen_toks`: tokens to generate where the task does not say.

    Raises `ArgumentError`.
    """

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: int | str = 1, window: int = 1024,
        prefix_token_id: int | None = None, max_gen_toks: int = 256, max_batch_size: int | None = None,
    ):  # fmt: skip
        super().__init__()
        for name, value in (("batch_size", batch_size), ("window", window)):
            if not (str(value).isdigit() and int(value) >= 1):
                bad_value(name, repr(value), "an integer >= 1")
        if device == "cuda:0" and not torch.cuda.is_available():  # what lm-eval's command line says for nothing said
            device = None
        self._device, self.batch_size, self.window = choose_device(device), int(batch_size), window
        self.model = load_model(pretrained, self._device)
        self.tokenizer: Any = text_tokenizer(pretrained, self.model.config)
        self.prefix, self.max_gen_toks = prefix_token_id, max_gen_toks

    @property
    def eot_token_id(self) -> int | None:  # type: ignore[override]
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        given = self.eot_token_id if self.prefix is None else self.prefix
        return self.tok_encode("\n")[0] if given is None else given

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Text -> tokens and nothing added, as `parashoot data` encodes it."""
        return self.tokenizer.encode(string, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> list[Any]:
        return self._score([([*given, *scored], len(scored)) for _, given, scored in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each whole text after the prefix token."""
        texts = [self.tok_encode(r.args[0]) for r in requests]
        scores = self._score([([self.prefix_token_id, *t], len(t)) for t in texts], disable_tqdm)
        return [value for value, _ in scores]

    @torch.no_grad()
    def _score(self, texts: list[tuple[list[int], int]], quiet: bool) -> list[tuple[float, bool]]:
        """For each (tokens, count): ln p of its last `count` tokens given those before, and whether each was the likeliest."""
        order, found = utils.Collator(texts, sort_fn=lambda text: -len(text[0])), []
        for batch in tqdm(order.get_batched(n=self.batch_size), "batches scored", disable=quiet):
            length = len(batch[0][0])
            ids = torch.zeros(len(batch), length, dtype=torch.int64)  # what stands after a text reaches nothing of it
            scored = torch.zeros_like(ids, dtype=torch.bool)
            for k, (row, count) in enumerate(batch):
                ids[k, : len(row)] = torch.tensor(row)
                scored[k, len(row) - count : len(row)] = True
            ids, scored, past = ids.to(self._device), scored.to(self._device), Cache()
            total, likeliest = scored.new_zeros(len(batch), dtype=torch.float64), scored.new_ones(len(batch))
            for at in range(0, length - 1, self.window):
                end = min(at + self.window, length - 1)
                logits = self.model(ids[:, at:end], past_key_values=past).logits
                target, here = ids[:, at + 1 : end + 1], scored[:, at + 1 : end + 1]
                nats = F.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), reduction="none")
                total -= nats.view_as(target).double().masked_fill(~here, 0.0).sum(1)
                likeliest &= ((logits.argmax(-1) == target) | ~here).all(1)
            found += zip(total.tolist(), likeliest.tolist(), strict=True)
        return order.get_original(found)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of the strings that end it."""
        rows = [(self.tok_encode(r.args[0]) or [self.prefix_token_id], r.args[1]) for r in requests]
        order, found = utils.Collator(rows, sort_fn=lambda row: -len(row[0]), group_by="gen_kwargs"), []
        for batch in tqdm(order.get_batched(n=self.batch_size), "batches continued", disable=disable_tqdm):
            options: dict[str, Any] = dict(utils.normalize_gen_kwargs(batch[0][1], self.max_gen_toks))
            stops = utils.handle_stop_sequences(options.pop("until"), self.tokenizer.eos_token)
            if not options["do_sample"]:
                options.pop("temperature", None)
            length = len(batch[0][0])
            ids = torch.tensor([[0] * (length - len(row)) + row for row, _ in batch], device=self._device)
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row, _ in batch], device=self._device)
            ends = utils_hf.stop_sequences_criteria(self.tokenizer, stops, length, len(batch))
            options |= {"attention_mask": mask, "stopping_criteria": ends, "pad_token_id": 0}
            made = self.model.generate(ids, max_new_tokens=options.pop("max_gen_toks"), **options)
            texts = [self.tokenizer.decode(row, skip_special_tokens=False) for row in made[:, length:]]
            found += [utils.postprocess_generated_text(text, stops, None) for text in texts]
        return order.get_original(found)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    cli_evaluate()
