"""The shape of a language model, with the field names that Hugging Face configurations use."""

from __future__ import annotations

import inspect
import math
from dataclasses import fields
from itertools import chain
from typing import Any

import transformers
from transformers import PretrainedConfig

from ..cells.find import find_cell
from ..errors import bad_type, bad_value
from ..layers import bias_ranges

SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "intermediate_size", "conv_kernel", "state_expansion", "head_dim")  # fmt: skip
REQUIRED = SIZES[:3]
MIXERS = {
    "rnn": ("num_heads", "cell", "conv_kernel", "state_expansion", "recurrent_clip", "initial_bias"),
    "attention": ("head_dim",),
    "gated_delta": ("head_dim", "conv_kernel"),
}
"""`mixer` -> the fields that say how it is built."""
FROM_LIBRARY = ("architectures", "dtype", "torch_dtype")  # what transformers notes in a saved configuration


class ParaRNNConfig(PretrainedConfig):
    """Sizes and options of a `ParaRNNForCausalLM`; d is `hidden_size`.

    - `vocab_size`, `hidden_size`, `num_hidden_layers`.
    - `mixer`: what mixes the tokens: "rnn", a cell run in parallel over time; for comparison "attention", a Transformer with rotary
      positions, and "gated_delta", a linear RNN (Gated DeltaNet). Each has fields of its own, and refuses those of others.
    - `num_heads` (rnn): blocks of the cell's block-diagonal input projection.
    - `cell` (rnn): a name in `parashoot.cells`, or "module:attribute".
    - `intermediate_size`: width of the SwiGLU MLP; None: 8d/3 rounded up to a multiple of 256.
    - `conv_kernel` (rnn, gated_delta): taps of the causal convolution.
    - `state_expansion` e (rnn): the cell has e d channels.
    - `head_dim` (attention, gated_delta): width of a head's queries and keys; values of gated_delta are twice as wide.
    - `recurrent_clip` (rnn): bound on the cell's vector parameters; None: unbounded.
    - `initial_bias` (rnn): where biases of the cell's inputs begin, as in `ps.RNN`; None: at zero.
    - `tie_word_embeddings`: the head shares the embedding matrix.
    - `z_loss`: while training, this times the mean of logsumexp(logits)^2 is added to the loss.
    - `bos_token_id`, `eos_token_id`, `pad_token_id`: the tokens that begin, end and fill up a text; None: none does.
    - `rms_norm_eps`; `initializer_range`: standard deviation of embeddings and linear layers.

    Further names are those that `transformers.PretrainedConfig` knows. Raises `ArgumentError` and `ArgumentTypeError`. Source:
    Danieli et al. 2025 (ParaRNN, arXiv 2510.21450).
    """

    model_type = "pararnn"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size: int | None = None,
        hidden_size: int | None = None,
        num_hidden_layers: int | None = None,
        num_heads: int = 4,
        cell: str = "gru",
        intermediate_size: int | None = None,
        conv_kernel: int = 4,
        state_expansion: int = 1,
        recurrent_clip: float | None = 0.5,
        tie_word_embeddings: bool = False,
        z_loss: float = 0.0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        mixer: str = "rnn",
        head_dim: int = 64,
        initial_bias: dict[str, Any] | None = None,
        **library: Any,
    ):
        own = {name: value for name, value in locals().items() if name in own_fields()}
        _check_names(own, library)
        if intermediate_size is None and is_count(hidden_size):
            own["intermediate_size"] = math.ceil(8 * own["hidden_size"] / 3 / 256) * 256
        _check_values(own)
        own["initial_bias"] = _plain(initial_bias)
        shared = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
        super().__init__(**library, **{name: own.pop(name) for name in shared})
        for name, value in own.items():
            setattr(self, name, value)

    @property
    def cache_grows(self) -> bool:
        """Whether what the model keeps of the past grows with its length."""
        return self.mixer == "attention"

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `model_type`, as plain values."""
        return {"model_type": self.model_type, **{name: getattr(self, name) for name in own_fields()}}

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: `to_dict()` and what transformers notes beside it."""
        noted = {k: vars(self)[k] for k in FROM_LIBRARY if vars(self).get(k) is not None}
        noted = {k: v if isinstance(v, list) else str(v).removeprefix("torch.") for k, v in noted.items()}
        return {**self.to_dict(), **noted, "transformers_version": transformers.__version__}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that `to_dict` gave. Raises `ArgumentError` for unknown or missing names."""
        if not isinstance(config_dict, dict):
            bad_type(cls.__name__, config_dict, "a dict of its fields")
        return super().from_dict(dict(config_dict), **kwargs)

    def replace(self, **changes: Any) -> ParaRNNConfig:
        """A copy with other values for some fields."""
        return type(self)(**{**{name: getattr(self, name) for name in own_fields()}, **changes})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParaRNNConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def own_fields() -> tuple[str, ...]:
    """The names of the fields of a `ParaRNNConfig`, without the library's."""
    return tuple(inspect.signature(ParaRNNConfig.__init__).parameters)[1:-1]


def foreign_fields(mixer: str) -> dict[str, Any]:
    """The fields that only concern other mixers than this one, and their defaults."""
    defaults = inspect.signature(ParaRNNConfig.__init__).parameters
    return {name: defaults[name].default for name in sorted({*chain(*MIXERS.values())} - {*MIXERS[mixer]})}


def is_count(value: object) -> bool:
    """Whether `value` is an integer >= 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def checked_names(kind: Any, values: Any) -> dict[str, Any]:
    """`values` if their names are fields of the dataclass `kind` and those without default are there."""
    if not isinstance(values, dict):
        bad_type(kind.__name__, values, "a dict of its fields")
    names = [f.name for f in fields(kind)]
    for name in values:
        if name not in names:
            bad_value(kind.__name__, f"the unknown field {name!r}", f"fields among {', '.join(names)}")
    required = tuple(n for n in names if not hasattr(kind, n))
    missing = [n for n in required if n not in values]
    if missing:
        bad_value(kind.__name__, f"no {', '.join(missing)}", f"the fields {', '.join(required)}")
    return values


def _check_names(own: dict[str, Any], library: dict[str, Any]) -> None:
    missing = [name for name in REQUIRED if own[name] is None]
    if missing:
        bad_value("ParaRNNConfig", f"no {', '.join(missing)}", f"the fields {', '.join(REQUIRED)}")
    known = {*vars(PretrainedConfig()), *FROM_LIBRARY, "model_type", "name_or_path", "num_labels", "output_attentions", "auto_map"}  # fmt: skip
    for name in library:
        if name not in known and not name.startswith("_") and not name.endswith("_implementation"):
            bad_value("ParaRNNConfig", f"the unknown field {name!r}", f"fields among {', '.join(own)}")


def _check_values(own: dict[str, Any]) -> None:
    for name in SIZES:
        if not is_count(own[name]):
            bad_value(name, repr(own[name]), "an integer >= 1")
    _check_mixer(own)
    if not isinstance(own["cell"], str) or ":" not in own["cell"]:
        bias_ranges(find_cell(own["cell"]), own["initial_bias"])
    for name in ("recurrent_clip", "rms_norm_eps", "initializer_range", "z_loss"):
        value, least = own[name], "a finite number >= 0" if name == "z_loss" else "a finite number > 0"
        if value is None and name == "recurrent_clip":
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
        if not number or (value == 0 and name != "z_loss"):
            bad_value(name, repr(value), least + (" or None" if name == "recurrent_clip" else ""))
    if not isinstance(own["tie_word_embeddings"], bool):
        bad_type("tie_word_embeddings", own["tie_word_embeddings"], "True or False")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token, vocab = own[name], own["vocab_size"]
        if token is not None and (not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab):
            bad_value(name, repr(token), f"None or a token below vocab_size = {vocab}")


def _plain(value: Any) -> Any:
    """Biases as JSON gives them back; what is none stays as it is, for the layer to refuse."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (str, bool)) else float(value)


def _check_mixer(own: dict[str, Any]) -> None:
    mixer, d, n = own["mixer"], own["hidden_size"], own["head_dim"]
    if not isinstance(mixer, str) or mixer not in MIXERS:
        bad_value("mixer", repr(mixer), f"one of {', '.join(MIXERS)}")
    for name, default in foreign_fields(mixer).items():
        if own[name] != default:
            bad_value(name, repr(own[name]), f"{default!r} with mixer = '{mixer}'", "That mixer has no such part.")
    if mixer == "rnn" and d % own["num_heads"]:
        bad_value("hidden_size", str(d), f"a multiple of num_heads = {own['num_heads']}")
    if mixer == "attention" and n % 2:
        bad_value("head_dim", str(n), "an even number, because positions turn pairs of channels")
    heads_of = {"attention": ("head_dim", n), "gated_delta": ("2 head_dim", 2 * n)}
    if mixer in heads_of and d % heads_of[mixer][1]:
        name, width = heads_of[mixer]
        bad_value("hidden_size", str(d), f"a multiple of {name} = {width}", "Choose another head_dim.")
