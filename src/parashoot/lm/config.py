"""The shape of a language model, with the field names that Hugging Face configurations use."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import bad_type, bad_value
from .find_cell import find_cell


@dataclass
class ParaRNNConfig:
    """Sizes and options of a `ParaRNNForCausalLM`; d is `hidden_size`.

    - `vocab_size`, `hidden_size`, `num_hidden_layers`.
    - `num_heads`: blocks of the cell's block-diagonal input projection.
    - `cell`: a name in `parashoot.cells`, or "module:attribute".
    - `intermediate_size`: width of the SwiGLU MLP; None: 8d/3 rounded up to a multiple of 256.
    - `conv_kernel`: taps of the causal convolution in front of the cell.
    - `recurrent_clip`: bound on the cell's vector parameters; None: unbounded.
    - `tie_word_embeddings`: the head shares the embedding matrix.
    - `eos_token_id`: the token that ends a generated text; None: none does.
    - `rms_norm_eps`; `initializer_range`: standard deviation of embeddings and linear layers.

    Raises `ArgumentError` and `ArgumentTypeError`. Source: Danieli et al. 2025 (ParaRNN, arXiv 2510.21450).
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int = 4
    cell: str = "gru"
    intermediate_size: int | None = None
    conv_kernel: int = 4
    recurrent_clip: float | None = 0.5
    tie_word_embeddings: bool = False
    eos_token_id: int | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    model_type = "pararnn"

    def __post_init__(self) -> None:
        if self.intermediate_size is None and is_count(self.hidden_size):
            self.intermediate_size = math.ceil(8 * self.hidden_size / 3 / 256) * 256
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "conv_kernel"):
            if not is_count(getattr(self, name)):
                bad_value(name, repr(getattr(self, name)), "an integer >= 1")
        if self.hidden_size % self.num_heads:
            bad_value("hidden_size", str(self.hidden_size), f"a multiple of num_heads = {self.num_heads}")
        if not isinstance(self.cell, str) or ":" not in self.cell:
            find_cell(self.cell)
        for name in ("recurrent_clip", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if value is None and name == "recurrent_clip":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                bad_value(name, repr(value), "a finite number > 0" + (" or None" if name == "recurrent_clip" else ""))
        if not isinstance(self.tie_word_embeddings, bool):
            bad_type("tie_word_embeddings", self.tie_word_embeddings, "True or False")
        eos = self.eos_token_id
        if eos is not None and (not isinstance(eos, int) or isinstance(eos, bool) or not 0 <= eos < self.vocab_size):
            bad_value("eos_token_id", repr(eos), f"None or a token below vocab_size = {self.vocab_size}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `model_type`, as plain values."""
        return {"model_type": self.model_type, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ParaRNNConfig:
        """The configuration that `to_dict` gave. Raises `ArgumentError` for unknown or missing names."""
        values = dict(checked_names(cls, {k: v for k, v in values.items() if k != "model_type"}))
        return cls(**values)


def is_count(value: object) -> bool:
    """Whether `value` is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def checked_names(kind: Any, values: Any, *, required: tuple[str, ...] | None = None) -> dict[str, Any]:
    """`values` if their names are fields of the dataclass `kind` and the `required` ones (None: those without default) are there."""
    if not isinstance(values, dict):
        bad_type(kind.__name__, values, "a dict of its fields")
    names = [f.name for f in fields(kind)]
    if required is None:
        required = tuple(n for n in names if not hasattr(kind, n))
    for name in values:
        if name not in names:
            bad_value(kind.__name__, f"the unknown field {name!r}", f"fields among {', '.join(names)}")
    missing = [n for n in required if n not in values]
    if missing:
        bad_value(kind.__name__, f"no {', '.join(missing)}", f"the fields {', '.join(required)}")
    return values
