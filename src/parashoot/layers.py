"""Recurrent layers over any cell, shaped like `torch.nn.GRU` (batch first): projections of the input, then `ps.scan`."""

from __future__ import annotations

import functools
import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .cell import Cell, parameter_shapes
from .cells import gru, lstm
from .errors import bad_type, bad_value
from .op import advance
from .plan import Solver, check_solver, compute_dtype
from .scan import check_reset, scan


class RNN(nn.Module):
    """A stack of recurrent layers: in each, x_t B^T + b gives the cell's inputs, and the cell runs over time.

    - `cell`; `input_size` D, `hidden_size` C; `num_layers`; `bias`: whether b exists.
    - `num_heads`: B is block-diagonal with that many blocks (input and hidden channels are split into heads).
    - `dropout` between layers while training; `bidirectional` adds a layer in reverse time, outputs concatenated.
    - `recurrent_clip`: vector parameters of the cell act clipped to [-clip, clip]; None: not clipped. What would push one of them further
      out is dropped from its gradient: of each call, or, with `drops_outward` set to False, once by `drop_outward` after the last backward pass.
      Several calls (of pieces of a sequence, or of `step`) sum to the gradient of one only that way.
    - `initial_bias`: by the name of an input, the number at which its biases begin, or (first, last), between which they lie evenly
      over the channels of each head: {"z": (-6, 0)} makes a GRU's update gates 1/400 to 1/2 at first, memories of 2 to 400 steps.
    - `solver` as in `ps.scan`.

    Initialization: B Kaiming uniform, b zero or `initial_bias`, recurrent vectors Xavier normal, recurrent matrices orthogonal. Raises
    `ArgumentError` and `ArgumentTypeError`. Source: Danieli et al. 2025 (ParaRNN, arXiv 2510.21450).
    """

    _scan = staticmethod(scan)

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        num_heads: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        recurrent_clip: float | None = None,
        initial_bias: dict[str, Any] | None = None,
        solver: Solver | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(cell, Cell):
            bad_type("cell", cell, "a cell", "Decorate the step with @ps.cell.")
        sizes = {"input_size": input_size, "hidden_size": hidden_size, "num_layers": num_layers, "num_heads": num_heads}
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                bad_value(name, repr(value), "an integer >= 1")
        for name, value in (("input_size", input_size), ("hidden_size", hidden_size)):
            if value % num_heads:
                bad_value(name, str(value), f"a multiple of num_heads = {num_heads}")
        if cell.width and hidden_size % cell.width:
            bad_value(
                "hidden_size", str(hidden_size), f"a multiple of the head width {cell.width} of cell '{cell.name}'"
            )
        if not _is_number(dropout) or not 0.0 <= dropout < 1.0:
            bad_value("dropout", repr(dropout), "a probability in [0, 1)")
        if recurrent_clip is not None and not (_is_number(recurrent_clip) and recurrent_clip > 0):
            bad_value("recurrent_clip", repr(recurrent_clip), "None or a number > 0")
        self.initial_bias = bias_ranges(cell, initial_bias)
        if initial_bias and not bias:
            bad_value("initial_bias", repr(initial_bias), "None with bias=False")
        check_solver(solver)
        self.cell, self.input_size, self.hidden_size, self.num_layers = cell, input_size, hidden_size, num_layers
        self.num_heads, self.bias, self.dropout, self.bidirectional = num_heads, bias, float(dropout), bidirectional
        self.recurrent_clip, self.solver, self.drops_outward = recurrent_clip, solver, True
        self._from_zero = _differentiable_at_zero(cell)
        shapes = parameter_shapes(cell, hidden_size)
        self._vectors = all(s == (hidden_size,) for s in shapes)
        gates, place = len(cell.inputs), {"device": device, "dtype": dtype}
        for layer, suffix in self._directions():
            size = (input_size if layer == 0 else hidden_size * (1 + bidirectional)) // num_heads
            weight = torch.empty(num_heads, gates * hidden_size // num_heads, size, **place)
            self.register_parameter(f"weight_ih_{suffix}", nn.Parameter(weight))
            self.register_parameter(
                f"bias_{suffix}", nn.Parameter(torch.empty(gates, hidden_size, **place)) if bias else None
            )
            if self._vectors and shapes:
                self.register_parameter(
                    f"weight_hh_{suffix}", nn.Parameter(torch.empty(len(shapes), hidden_size, **place))
                )
            elif shapes:
                for name, shape in zip(cell.params, shapes, strict=True):
                    self.register_parameter(f"weight_hh_{suffix}_{name}", nn.Parameter(torch.empty(shape, **place)))
        self.reset_parameters()

    def _directions(self) -> list[tuple[int, str]]:
        """(layer, parameter suffix) for each layer and direction, in the order of h_n."""
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [(k, f"l{k}{way}") for k in range(self.num_layers) for way in ways]

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for name, p in self.named_parameters():
            if getattr(p, "_is_hf_initialized", False):  # transformers loads a file without some of the others
                continue
            if name.startswith("bias"):
                nn.init.zeros_(p)
                for gate, (first, last) in self.initial_bias.items():
                    row = p.data[self.cell.inputs.index(gate)].view(self.num_heads, -1)
                    row.copy_(torch.linspace(first, last, row.shape[1], dtype=torch.float32, device=p.device))
            elif name.startswith("weight_ih"):
                nn.init.uniform_(p, -math.sqrt(3 / p.shape[-1]), math.sqrt(3 / p.shape[-1]))
            elif self._vectors:
                nn.init.xavier_normal_(p)
            elif p.dim() == 1:
                nn.init.xavier_normal_(p.view(1, -1))
            else:
                for block in p.data.view(-1, *p.shape[-2:]):  # a decomposition that narrow numbers do not have
                    exact = torch.promote_types(block.dtype, torch.float32)
                    block.copy_(nn.init.orthogonal_(torch.empty_like(block, dtype=exact)))

    def forward(
        self, x: Tensor, h_0: Tensor | None = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run over a batch of sequences: x (B, T, D), or in its heads (B, T, H, D / H), -> (y, h_n).

        - `h_0` (num_layers * directions, B, S, C): initial states, zeros by default.
        - `reset` (B, T) bool: a new sequence begins at t. `lengths` (B,): number of real steps of each sequence; outputs
          after them are zero, what stands there in x is not read, and h_n is the state after each sequence's own last step (reverse: its first).

        y (B, T, C * directions) in x's dtype; h_n shaped as h_0, in float32 where x is bfloat16 or float16 (with `lengths` rounded to
        what y is).
        """
        self._check(x, h_0, lengths)
        check_reset(reset, x)
        finals, out = [], x
        for layer in range(self.num_layers):
            if layer and self.dropout:
                out = nn.functional.dropout(out, self.dropout, self.training)
            out = out if lengths is None else _repeated(out, lengths)
            ways = []
            for k, suffix in [(k, s) for k, (at, s) in enumerate(self._directions()) if at == layer]:
                start = None if h_0 is None else h_0[k]
                y, final = self._direction(out, start, suffix, reset, lengths)
                ways.append(y)
                finals.append(final)
            out = torch.cat(ways, -1) if self.bidirectional else ways[0]
        return out, torch.stack(finals)

    def step(self, x_t: Tensor, h: Tensor | None = None, *, inplace: bool = False) -> tuple[Tensor, Tensor]:
        """One step of decoding: x_t (B, D), h (num_layers, B, S, C) -> (y_t (B, C), new h). Agrees with `forward`.

        `inplace` writes the new states into `h` and returns it; under `torch.no_grad()` on a GPU the step may then be captured in a
        CUDA graph.
        """
        if self.bidirectional:
            bad_value(
                "bidirectional",
                "True",
                "a unidirectional layer for step()",
                "A reverse layer needs the whole sequence.",
            )
        if not isinstance(x_t, Tensor):
            bad_type("x_t", x_t, f"a tensor (B, D) with D = {self.input_size}")
        if x_t.dim() != 2:
            bad_value("x_t", x_t, f"shape (B, D) = (B, {self.input_size})", "One step, no time axis.")
        if inplace and h is None:
            bad_value("h", "None", "the states to overwrite, because inplace=True")
        self._check(x_t.unsqueeze(1), h, None)
        finals, out = [], x_t
        for layer, suffix in self._directions():
            cell, inputs, params = self.prepared(out.unsqueeze(1), suffix)
            inputs = inputs[:, 0].flatten(2)
            dtype = compute_dtype(inputs.dtype)
            shape = (inputs.shape[0], len(self.cell.states), self.hidden_size)
            state = inputs.new_zeros(shape, dtype=dtype) if h is None else h[layer]
            state = advance(cell, state, inputs, params, inplace)
            out = state[:, self.cell.output].to(inputs.dtype, copy=True)  # the next step may overwrite the state
            finals.append(state)
        if inplace and h is not None:
            return out, h
        return out, torch.stack(finals) if len(finals) > 1 else finals[0].unsqueeze(0)

    def recurrent(self, suffix: str = "l0") -> list[Tensor]:
        """The cell's parameters for one layer and direction ("l0", "l0_reverse", ...), clipped, in the step's order."""
        if not self.cell.params:
            return []
        clip, drops = self.recurrent_clip, self.drops_outward
        if self._vectors:
            found = getattr(self, f"weight_hh_{suffix}")
            return list((_Clip.apply(found, clip, drops) if clip else found).unbind(0))  # type: ignore[misc]
        found = [getattr(self, f"weight_hh_{suffix}_{name}") for name in self.cell.params]
        return [_Clip.apply(p, clip, drops) if clip and p.dim() == 1 else p for p in found]  # type: ignore[misc]

    @torch.no_grad()
    def drop_outward(self) -> None:
        """Drop from the gradients what would push clipped parameters further out: after the last of several backward passes that
        add up, with `drops_outward` False, so that the sum does not depend on how a batch was cut."""
        for name, p in self.named_parameters():
            clipped = name.startswith("weight_hh") and (self._vectors or p.dim() == 1)
            if self.recurrent_clip and clipped and p.grad is not None:
                p.grad.masked_fill_(_outward(p, p.grad, self.recurrent_clip), 0.0)

    def prepared(self, x: Tensor, suffix: str = "l0") -> tuple[Cell, Tensor, list[Tensor]]:
        """What a layer and direction runs over x (B, T, D) or (B, T, H, D / H): a cell, its inputs (B, T, G, C) or, as products by heads
        leave them, (B, T, G, H, C / H), and its parameters. Kernels add the bias, as parameters of the cell, without a pass over the inputs."""
        weight, bias = getattr(self, f"weight_ih_{suffix}"), getattr(self, f"bias_{suffix}")
        cell, params = self.cell, self.recurrent(suffix)
        kernels = x.is_cuda or getattr(self.solver, "backend", None) == "triton"
        if bias is not None and kernels and cell.structure == "channelwise" and cell.with_bias:
            cell, params, bias = cell.with_bias, [*params, *bias.unbind(0)], None
        gates = (len(cell.inputs), self.hidden_size)
        if self.num_heads == 1:
            flat = None if bias is None else bias.flatten()
            return cell, nn.functional.linear(x, weight[0], flat).unflatten(-1, gates), params
        x = x if x.dim() == 4 else x.unflatten(-1, (self.num_heads, -1))
        # By way of a row: the gradient then lies in memory as the weight does, and compiled is written so in one go.
        z = torch.einsum("bthi,hoi->btho", x, weight.flatten().view(weight.shape))
        z = z.unflatten(-1, (gates[0], -1)).transpose(2, 3)
        return cell, z if bias is None else z + bias.unflatten(1, (self.num_heads, -1)).to(z.dtype), params

    def _direction(
        self, x: Tensor, h_0: Tensor | None, suffix: str, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        (cell, z, params), reverse = self.prepared(x, suffix), suffix.endswith("_reverse")
        start, dtype = h_0, compute_dtype(z.dtype)
        if h_0 is None:
            h_0 = z.new_zeros(z.shape[0], len(self.cell.states), self.hidden_size, dtype=dtype)
        params = [p.to(dtype) for p in params]
        options: dict[str, Any] = {"solver": self.solver} if self.solver is not None else {}
        if lengths is None:
            return self._scan(cell, z, params or None, h_0, reset=reset, reverse=reverse, **options)
        z = z.flatten(3)
        t, ends = torch.arange(z.shape[1], device=z.device), lengths.to(z.device)[:, None]
        if reverse:  # each sequence turned around within its own length
            order = torch.where(t < ends, ends - 1 - t, t)
            z = z.gather(1, order[:, :, None, None].expand_as(z))
            if reset is not None:
                reset = reset.gather(1, (ends - t).clamp(0, z.shape[1] - 1)) & (t > 0) & (t < ends)
        stop = t >= ends
        if start is None or self._from_zero:  # else padding goes on from where its sequence ended
            reset = stop if reset is None else reset | stop
        elif reset is not None:
            reset = reset & ~stop
        states, _ = self._scan(cell, z, params or None, h_0, reset=reset, return_states=True, **options)
        final = states.gather(1, (ends - 1)[:, :, None, None].expand(-1, 1, *states.shape[2:])).squeeze(1).to(h_0.dtype)
        y = states[:, :, self.cell.output]
        if reverse:
            y = y.gather(1, order[:, :, None].expand_as(y))
        return y.masked_fill((t >= ends)[:, :, None], 0.0), final

    def _check(self, x: Tensor, h_0: Tensor | None, lengths: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            bad_type("x", x, f"a tensor (B, T, D) with D = {self.input_size}")
        heads = (self.num_heads, self.input_size // self.num_heads)
        shapes = [(self.input_size,), heads] if heads[0] > 1 else [(self.input_size,)]
        if tuple(x.shape[2:]) not in shapes:
            or_heads = f", or (B, T, H, D / H) = (B, T, {heads[0]}, {heads[1]})" if heads[0] > 1 else ""
            bad_value("x", x, f"shape (B, T, D) with D = input_size = {self.input_size}{or_heads}")
        if not x.dtype.is_floating_point:
            bad_value("x", x, "a floating dtype")
        if h_0 is not None:
            shape = (len(self._directions()), x.shape[0], len(self.cell.states), self.hidden_size)
            if not isinstance(h_0, Tensor):
                bad_type("h_0", h_0, f"None or a tensor {shape}")
            if not h_0.dtype.is_floating_point:
                bad_value("h_0", h_0, "a floating dtype")
            if tuple(h_0.shape) != shape:
                bad_value("h_0", h_0, f"shape (num_layers * directions, B, S, C) = {shape}")
        if lengths is not None:
            if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
                bad_type("lengths", lengths, "None or an int64 tensor (B,)")
            if tuple(lengths.shape) != (x.shape[0],):
                bad_value("lengths", lengths, f"shape (B,) = {(x.shape[0],)}")
            if not torch.compiler.is_compiling() and not bool(((lengths >= 1) & (lengths <= x.shape[1])).all()):
                bad_value("lengths", str(lengths.tolist()), f"numbers between 1 and T = {x.shape[1]}")

    def extra_repr(self) -> str:
        text = f"{self.cell.name}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, num_heads={self.num_heads}"
        text += ", bidirectional=True" if self.bidirectional else ""
        text += f", initial_bias={self.initial_bias}" if self.initial_bias else ""
        return text + f", recurrent_clip={self.recurrent_clip}"


def _repeated(x: Tensor, lengths: Tensor) -> Tensor:
    """x (B, T, ...) with each sequence's last step in place of all that stands after it: a step need not be made for zeros."""
    ends = lengths.to(x.device)
    beyond = torch.arange(x.shape[1], device=x.device) >= ends[:, None]
    last = x[torch.arange(x.shape[0], device=x.device), ends - 1]
    return torch.where(beyond.view(*beyond.shape, *[1] * (x.dim() - 2)), last.unsqueeze(1), x)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@functools.lru_cache(maxsize=256)
def _differentiable_at_zero(cell: Cell) -> bool:
    """Whether a step from zero has derivatives, at random inputs and parameters."""
    draw, channels = torch.Generator().manual_seed(0), cell.width or 4
    feature = (1, channels) if cell.width else (channels,)
    heads = lambda shape: (1, channels) if cell.width and len(shape) == 1 else shape  # vectors as a step sees them
    sizes = [(2, *feature)] * len(cell.inputs) + [heads(s) for s in parameter_shapes(cell, channels)]
    values = [torch.zeros(2, *feature, dtype=torch.float64, device="cpu") for _ in cell.states]
    values += [torch.rand(s, generator=draw, dtype=torch.float64, device="cpu") for s in sizes]
    states, moving = len(cell.states), len(cell.states) + len(cell.inputs)
    try:
        with torch.enable_grad():
            leaves = [v.requires_grad_() for v in values]
            new = cell.new_states(leaves[:states], leaves[states:moving], leaves[moving:])
            found = torch.autograd.grad([v.sum() for v in new if v.requires_grad], leaves, allow_unused=True)
    except Exception:  # what is wrong with the step is said when it runs
        return True
    return all(bool(torch.isfinite(g).all()) for g in found if g is not None)


def bias_ranges(cell: Cell, given: Any) -> dict[str, tuple[float, float]]:
    """`initial_bias` of an `RNN` with the two ends of each input. Raises `ArgumentError` and `ArgumentTypeError`."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        bad_type("initial_bias", given, "a dict of numbers or pairs of numbers by the names of the cell's inputs")
    ranges = {}
    for name, value in given.items():
        if name not in cell.inputs:
            inputs = ", ".join(cell.inputs)
            bad_value("initial_bias", repr(name), f"one of {inputs}, the inputs of cell '{cell.name}'")
        ends = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(ends) != 2 or not all(_is_number(v) and abs(v) < 1e30 for v in ends):
            bad_value(f"initial_bias of {name}", repr(value), "a finite number, or the first and the last as a pair")
        ranges[name] = ends
    return ranges


class _FromPaper(RNN):
    _cell: Cell

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, *, recurrent_clip: float | None = 0.5, **options: Any
    ):  # fmt: skip
        super().__init__(self._cell, input_size, hidden_size, num_layers, recurrent_clip=recurrent_clip, **options)


class ParaGRU(_FromPaper):
    """`RNN` with the paper's GRU (`ps.cells.gru`), recurrent vectors clipped to 0.5 unless `recurrent_clip` says otherwise."""

    _cell = gru


class ParaLSTM(_FromPaper):
    """`RNN` with the paper's LSTM (`ps.cells.lstm`, states c and h), recurrent vectors clipped to 0.5 as in `ParaGRU`."""

    _cell = lstm


class _Clip(torch.autograd.Function):
    """min(max(a, -clip), clip); a gradient that would push an entry further out is dropped if it `drops`, one that brings it back is kept."""

    @staticmethod
    def forward(ctx, a: Tensor, clip: float, drops: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a)
        ctx.clip, ctx.drops = clip, drops
        return a.clamp(-clip, clip)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (a,) = ctx.saved_tensors
        return grad.masked_fill(_outward(a, grad, ctx.clip), 0.0) if ctx.drops else grad, None, None


def _outward(a: Tensor, grad: Tensor, clip: float) -> Tensor:
    return ((a > clip) & (grad < 0)) | ((a < -clip) & (grad > 0))
