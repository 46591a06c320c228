"""The few things that training and evaluation know about how a language model is built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import bad_type, bad_value
from .config import ParaRNNConfig
from .model import ParaRNNForCausalLM
from .order import mix

UNDECAYED = ("mixer.conv.weight", "mixer.rnn.bias_l0", "mixer.rnn.weight_hh_l0")
"""Parameters that are several vectors stored as one tensor."""


def model_config(values: Any) -> ParaRNNConfig:
    """The configuration that `to_dict` gave; "pararnn" without a `model_type`. Raises `ArgumentError`."""
    if not isinstance(values, dict):
        bad_type("model", values, "an object of the model's fields")
    kind, mine = values.get("model_type", ParaRNNConfig.model_type), ParaRNNConfig.model_type
    if kind != mine:
        bad_value("model.model_type", repr(kind), f"one of {mine}")
    return ParaRNNConfig.from_dict(values)


def build_model(config: ParaRNNConfig) -> ParaRNNForCausalLM:
    """A new model of `config` on the meta device: shapes without storage, which `materialized` gives to it."""
    with torch.device("meta"):
        return ParaRNNForCausalLM(config)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks, which are compiled, checkpointed and sharded one by one."""
    return list(model.get_submodule("model.layers").children())


def materialized(model: Any, device: torch.device, seed: int | None) -> Iterator[nn.Module]:
    """Give `model` storage on `device` and draw its weights, part by part; yield each block, and last the model, when its own are there.

    Weights depend on `seed` and the kind of device alone, and PyTorch's generators stay as they were. For `seed` None the weights
    are left to be loaded.
    """
    found = [list(block.modules()) for block in blocks(model)]
    inside = {module for part in found for module in part}
    for number, part in enumerate([*found, [module for module in model.modules() if module not in inside]]):
        for module in part:
            module.to_empty(device=device, recurse=False)
        if part[0] is model:
            model.tie_weights()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(mix(seed or 0, number))
            for module in reversed(part):  # children first
                if seed is not None or module._non_persistent_buffers_set:  # which no checkpoint holds
                    model._init_weights(module)
        yield part[0]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and the rest: vectors, also where several are stored as one tensor."""
    groups: tuple[list, list] = ([], [])
    for name, p in model.named_parameters():
        groups[p.dim() < 2 or name.endswith(UNDECAYED)].append(p)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]
