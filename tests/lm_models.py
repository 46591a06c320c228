"""Small language models for tests, and the model as a loop over tokens, written from its equations."""

# ruff: noqa: E402
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

transformers: Any = pytest.importorskip("transformers")
from parashoot.lm import ParaRNNConfig, ParaRNNForCausalLM

TINY = ParaRNNConfig(vocab_size=256, hidden_size=16, num_hidden_layers=2, num_heads=2, intermediate_size=32)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple) else (out,):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


def tiny_model(**changes: Any) -> Any:
    """In float64, all parameters far from where they begin."""
    torch.manual_seed(0)
    made = ParaRNNForCausalLM(TINY.replace(initializer_range=0.3, **changes)).double()
    for name, p in made.named_parameters():
        if name.endswith(("weight_hh_l0", "bias_l0", "conv.bias", "residual_scale", "norm.weight")):
            torch.nn.init.normal_(p, mean=float(name.endswith(("scale", "norm.weight"))), std=0.3)
    return made.eval()


def tokens(batch: int, time: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 256, (batch, time), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_by_loop(model: ParaRNNForCausalLM, ids: Tensor) -> Tensor:
    """Logits (T, V) for one text (T,) of a model whose cell has vectors for parameters and is not headwise."""
    p = {k.removeprefix("model."): v for k, v in model.state_dict().items()}
    c, past = model.config, {}
    norm = lambda x, name: x * (x.square().mean() + c.rms_norm_eps).rsqrt() * p[name]
    rows = []
    for token in ids:
        x = p["embed_tokens.weight"][token]
        for k, layer in enumerate(model.recurrent_layers()):
            at, cell = f"layers.{k}.", layer.cell
            u, g = (p[at + "mixer.in_proj.weight"] @ norm(x, at + "mixer_norm.weight")).chunk(2)
            window, states = past.get(
                k, ([torch.zeros_like(u)] * (c.conv_kernel - 1), [torch.zeros_like(u)] * len(cell.states))
            )
            window = [*window, u]
            u = p[at + "mixer.conv.bias"] + sum(
                w * v for w, v in zip(p[at + "mixer.conv.weight"], reversed(window), strict=True)
            )
            heads = zip(p[at + "mixer.rnn.weight_ih_l0"], F.silu(u).chunk(c.num_heads), strict=True)
            gates = torch.cat([(w @ v).view(len(cell.inputs), -1) for w, v in heads], 1) + p[at + "mixer.rnn.bias_l0"]
            weights = p.get(at + "mixer.rnn.weight_hh_l0", gates[:0]).clamp(-c.recurrent_clip, c.recurrent_clip)
            new = cell.step(*states, *gates, *weights)
            states = list(new) if isinstance(new, tuple) else [new]
            past[k] = window[1:], states
            y = norm(states[cell.output] * F.silu(g), at + "mixer.norm.weight")
            x = p[at + "residual_scale"] * x + p[at + "mixer.out_proj.weight"] @ y
            a, b = (p[at + "mlp.up_proj.weight"] @ norm(x, at + "mlp_norm.weight")).chunk(2)
            x = x + p[at + "mlp.down_proj.weight"] @ (F.silu(a) * b)
        rows.append(p["lm_head.weight"] @ norm(x, "norm.weight"))
    return torch.stack(rows)
