"""The processes of a run: one, or those that torchrun started, each with its device and its share of the model (FSDP2)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from ..errors import bad_value
from .models import blocks, materialized


@dataclass(frozen=True)
class Processes:
    """This process's `rank` among `size`, and its `device`."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, on each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on one of them; no GPU takes part."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found)
        return bool(found)

    def gather(self, value: Any) -> list[Any]:
        """Each process's `value`, on each."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def barrier(self) -> None:
        """Wait for all processes."""
        self.gather(None)


@contextlib.contextmanager
def processes(device: str | torch.device | None = None) -> Iterator[Processes]:
    """This process alone, or with the others that torchrun started; they talk through NCCL on GPUs, Gloo on CPUs.

    `device` None takes a GPU if there is one. Raises `ArgumentError` if it is not there.
    """
    size, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    found = choose_device(device)
    if size == 1:
        yield Processes(0, 1, found)
        return
    if found.type == "cuda":
        found = choose_device(f"cuda:{local}")
        torch.cuda.set_device(found)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=found)
    else:
        dist.init_process_group("gloo")
    try:
        yield Processes(dist.get_rank(), size, found)
    finally:
        dist.destroy_process_group()


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; for None a GPU if there is one. Raises `ArgumentError` if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        bad_value("device", f"'{device}'", "a device of this machine", f"PyTorch says: {str(e).splitlines()[0][:120]}")
    return found


def place(
    model: nn.Module, group: Processes, *, seed: int | None, bf16: bool, compiled: bool, checkpointed: bool
) -> None:
    """Bring `model` from the meta device to this process's, part by part: drawn, compiled, checkpointed, sharded.

    Several processes hold a share of each float32 weight (FSDP2), gather it as bfloat16 where `bf16`, and sum gradients in float32.
    No process ever holds more than its share of the model and one part as a whole.
    """
    sharded: dict[str, Any] = {}
    if group.size > 1:
        sharded["mesh"] = init_device_mesh(group.device.type, (group.size,))
        sharded["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32)
    for block in blocks(model):
        if compiled:
            block.forward = torch.compile(block.forward)
        if checkpointed:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for part in materialized(model, group.device, seed):
        if sharded:
            fully_shard(part, **sharded)
    if sharded:
        register_fsdp_forward_method(model, "token_losses")


def precision(group: Processes, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    """What forward passes run under: bfloat16 autocast on one process; several have it from `place`."""
    if bf16 and group.size == 1:
        # A pass reads each weight once: a cache would only keep all copies until it ends.
        return torch.autocast(group.device.type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()
