"""The models that are compared, by names such as "cell:gru", "block:lstm", "block:attention" and "torch:gru"."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..cells.find import find_cell
from ..errors import bad_value
from ..layers import RNN
from ..lm import ParaRNNConfig, ParaRNNForCausalLM
from ..lm.model import CausalLMOutput
from ..plan import Sequential

TORCH = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
SOLVERS = {"parallel": None, "sequential": Sequential()}
FORMS = "'cell:CELL', 'block:CELL', 'block:attention' or 'torch:gru', 'torch:lstm', 'torch:rnn'"


class Bare(nn.Module):
    """Embedding, recurrent layers, head: token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, rnn: nn.Module, vocab_size: int, hidden_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden_size)
        self.rnn = rnn
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, input_ids: Tensor, reset: None = None, logits_to_keep: int = 0) -> CausalLMOutput:
        """As `ParaRNNForCausalLM`."""
        y, _ = self.rnn(self.embed(input_ids))
        return CausalLMOutput(logits=self.head(y[:, -logits_to_keep:]))

    def recurrent_layers(self) -> list[RNN]:
        """As `ParaRNNForCausalLM`."""
        return [self.rnn] if isinstance(self.rnn, RNN) else []


def parts(name: str) -> tuple[str, str]:
    """The kind of a model and its cell. Raises `ArgumentError` and `ArgumentTypeError` if there is no such model."""
    kind, _, cell = name.partition(":") if isinstance(name, str) else ("", "", "")
    if kind not in ("cell", "block", "torch") or (kind == "torch" and cell not in TORCH):
        bad_value("model", repr(name), FORMS)
    if kind != "torch" and (kind, cell) != ("block", "attention"):
        find_cell(cell, argument="model")
    return kind, cell


def build_model(
    name: str, vocab_size: int, *, hidden_size: int, num_layers: int, num_heads: int, recurrent_clip: float | None,
    solver: str, initial_bias: dict[str, Any] | None = None, initial_recurrent: dict[str, float] | None = None,
) -> Any:  # fmt: skip
    """A new model, weights drawn from PyTorch's generator. Raises `ArgumentError`, for a name among others.

    - "cell:CELL": embedding, `ps.RNN`, head. "torch:gru", "torch:lstm", "torch:rnn": the dense layers of PyTorch in its place.
    - "block:CELL": a `ParaRNNForCausalLM` of `num_layers` blocks; "block:attention": its blocks with attention.
    - `initial_bias`: as in `ps.RNN`. `initial_recurrent`: numbers added, before training, to the parameters of a channelwise cell of
      these names, in all channels of all layers.
    - `solver`: "parallel" in time, as the library decides, or "sequential", the loop.
    """
    kind, cell = parts(name)
    if hidden_size % num_heads:
        bad_value("num_heads", str(num_heads), f"a divisor of hidden_size = {hidden_size}")
    model: Any
    if kind == "block":
        recurrent = {
            "cell": cell,
            "num_heads": num_heads,
            "recurrent_clip": recurrent_clip,
            "initial_bias": initial_bias,
        }
        which: dict[str, Any] = (
            {"mixer": "attention", "head_dim": hidden_size // num_heads} if cell == "attention" else recurrent
        )
        model = ParaRNNForCausalLM(ParaRNNConfig(vocab_size, hidden_size, num_layers, **which))
    elif kind == "cell":
        rnn = RNN(
            find_cell(cell), hidden_size, hidden_size, num_layers, num_heads=num_heads,
            recurrent_clip=recurrent_clip, initial_bias=initial_bias,
        )  # fmt: skip
        model = Bare(rnn, vocab_size, hidden_size)
    else:
        model = Bare(TORCH[cell](hidden_size, hidden_size, num_layers, batch_first=True), vocab_size, hidden_size)
    for layer in model.recurrent_layers():
        layer.solver = SOLVERS[solver]
        for rows in (p.data for name, p in layer.named_parameters() if name.startswith("weight_hh")):
            for name, value in (initial_recurrent or {}).items():
                rows[layer.cell.params.index(name)] += value
    return model
