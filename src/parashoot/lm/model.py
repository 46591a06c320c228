"""The language model: blocks of a recurrent mixer and an MLP, as in ParaRNN (Danieli et al. 2025, arXiv 2510.21450).

    u, g = W_in norm(x);  y = cell(silu(conv(u)));  x <- s * x + W_out norm(y * silu(g));  x <- x + MLP(norm(x))

A `Cache` holds what a block needs of the past, the same size whatever the length: the last k - 1 inputs of its convolution
and the cell's state. So `forward` in pieces equals `forward` at once, and `step` decodes one token in constant time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import bad_type, bad_value
from ..layers import RNN
from .config import ParaRNNConfig
from .conv import CausalConv
from .find_cell import find_cell


@dataclass
class Cache:
    """The past, for each block: `conv` (B, k - 1, d) and `state` (1, B, S, d)."""

    conv: list[Tensor]
    state: list[Tensor]

    def detach(self) -> Cache:
        """The same past, through which no gradient flows."""
        return Cache([t.detach() for t in self.conv], [t.detach() for t in self.state])


@dataclass
class CausalLMOutput:
    """`loss` (scalar, or None without labels), `logits` (B, T, V), and the `cache` after the last token."""

    loss: Tensor | None
    logits: Tensor
    cache: Cache


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * w, with w in the dtype of x, for which PyTorch has a fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Mixer(nn.Module):
    """W_out norm(cell(silu(conv(u))) * silu(g)), with u, g = W_in x: (B, T, d) -> (B, T, d)."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        d = config.hidden_size
        self.in_proj = nn.Linear(d, 2 * d, bias=False)
        self.conv = CausalConv(d, config.conv_kernel)
        self.rnn = RNN(find_cell(config.cell), d, d, num_heads=config.num_heads, recurrent_clip=config.recurrent_clip)
        self.norm = RMSNorm(d, eps=config.rms_norm_eps)
        self.out_proj = nn.Linear(d, d, bias=False)

    def forward(
        self, x: Tensor, conv: Tensor | None, state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d), the past `conv` and `state` -> (y (B, T, d), their values after the last step)."""
        u, g = self.in_proj(x).chunk(2, -1)
        u, conv_after = self.conv(u, conv, reset)
        y, state_after = self.rnn(F.silu(u), state, reset=reset)
        return self.out_proj(self.norm(y * F.silu(g))), conv_after, state_after

    def step(self, x: Tensor, conv: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same for one step: x (B, d)."""
        u, g = self.in_proj(x).chunk(2, -1)
        u, conv_after = self.conv.step(u, conv)
        y, state_after = self.rnn.step(F.silu(u), state)
        return self.out_proj(self.norm(y * F.silu(g))), conv_after, state_after


class SwiGLU(nn.Module):
    """W_down (silu(a) * b), with a, b = W_up x: (..., d) -> (..., d)."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(a) * b)


class Block(nn.Module):
    """x <- s * x + mixer(norm(x)), with s learned for each channel, then x <- x + MLP(norm(x))."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = Mixer(config)
        self.residual_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, conv: Tensor | None, state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d), the past -> (x (B, T, d), the past after it)."""
        y, conv_after, state_after = self.mixer(self.mixer_norm(x), conv, state, reset)
        x = self.residual_scale * x + y
        return x + self.mlp(self.mlp_norm(x)), conv_after, state_after

    def step(self, x: Tensor, conv: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same for one step: x (B, d)."""
        y, conv_after, state_after = self.mixer.step(self.mixer_norm(x), conv, state)
        x = self.residual_scale * x + y
        return x + self.mlp(self.mlp_norm(x)), conv_after, state_after


class ParaRNNForCausalLM(nn.Module):
    """Embedding, `num_hidden_layers` blocks, a norm and a head: token ids (B, T) -> logits (B, T, V)."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        if not isinstance(config, ParaRNNConfig):
            bad_type("config", config, "a ParaRNNConfig")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.reset_parameters()
        if config.tie_word_embeddings:
            self.head.weight = self.embedding.weight

    def reset_parameters(self) -> None:
        """Draw embeddings and linear layers from N(0, r^2), those that write to the residual from N(0, r^2 / 2L)."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                writes = name.endswith(("out_proj", "down_proj"))
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * len(self.blocks)) if writes else std)

    def recurrent_layers(self) -> list[RNN]:
        """The recurrent layer of each block; assign their `solver` to choose how time runs."""
        return [m.rnn for m in self.modules() if isinstance(m, Mixer)]

    def num_parameters(self) -> int:
        """Number of parameters, a shared matrix counted once."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, cache: Cache | None = None, reset: Tensor | None = None
    ) -> CausalLMOutput:
        """Run over tokens in parallel over time, from `cache` on if there is one.

        - `input_ids` (B, T) int64. `labels` (B, T): usually `input_ids`; the logits at t are scored against the label at
          t + 1, and labels of -100 are left out. At least two tokens are then needed.
        - `reset` (B, T) bool: a new document begins at t; nothing of earlier tokens reaches it.
        """
        self._check(input_ids, 2, cache)
        for name, value, dtype in (("labels", labels, torch.int64), ("reset", reset, torch.bool)):
            if value is not None and (value.dtype != dtype or value.shape != input_ids.shape):
                bad_value(name, value, f"{dtype} of the shape of input_ids, {tuple(input_ids.shape)}")
        if labels is not None and labels.shape[1] < 2:
            bad_value("labels", labels, "at least two tokens", "The first one has nothing that predicts it.")
        x, after = self.embedding(input_ids), Cache([], [])
        for k, block in enumerate(self.blocks):
            x, conv, state = block(x, *_past(cache, k), reset)
            after.conv.append(conv)
            after.state.append(state)
        logits = self.head(self.norm(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutput(loss, logits, after)

    def step(self, token: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """One step of decoding: token (B,) -> (logits (B, V), the cache after it). Agrees with `forward`."""
        self._check(token, 1, cache)
        x, after = self.embedding(token), Cache([], [])
        for k, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x, conv, state = block.step(x, *_past(cache, k))
            after.conv.append(conv)
            after.state.append(state)
        return self.head(self.norm(x)), after

    def _check(self, tokens: Tensor, dims: int, cache: Cache | None) -> None:
        shape = "(B, T)" if dims == 2 else "(B,)"
        name = "input_ids" if dims == 2 else "token"
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            bad_type(name, tokens, f"an int64 tensor {shape} of token ids")
        if tokens.dim() != dims or tokens.numel() == 0:
            bad_value(name, tokens, f"shape {shape}, not empty")
        if cache is not None and (len(cache.state) != len(self.blocks) or cache.state[0].shape[1] != tokens.shape[0]):
            came = f"{len(cache.state)} blocks, batch {cache.state[0].shape[1] if cache.state else 0}"
            bad_value("cache", came, f"{len(self.blocks)} blocks, batch {tokens.shape[0]}")


def _past(cache: Cache | None, block: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cache is None else (cache.conv[block], cache.state[block])
