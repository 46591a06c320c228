"""A model in training and its update: passes over a batch, clipping and AdamW, queued on the device without waiting for a result."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .captured import Batch, Captured
from .models import build_model, parameter_groups
from .processes import Processes, place, precision
from .train_config import TrainConfig


def uses_bf16(config: TrainConfig, group: Processes) -> bool:
    """The precision that a configuration asks for, on this device by default."""
    return (config.precision or ("bf16" if group.device.type == "cuda" else "fp32")) == "bf16"


def mark(device: torch.device) -> Any:
    """This moment, on a GPU that at which it gets here."""
    if device.type != "cuda":
        return time.perf_counter()
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))


def between(a: Any, b: Any) -> float:
    """Seconds from one `mark` to a later one; waits for it."""
    if isinstance(a, float):
        return b - a
    b.synchronize()
    return a.elapsed_time(b) / 1e3


class Late:
    """Numbers on their way from the device; `read` waits for them, and not for what was queued after them. `there`: its mark."""

    def __init__(self, values: Tensor):
        self._values = values.to("cpu", non_blocking=True)
        self.there = mark(values.device)

    def read(self) -> list[float]:
        """The numbers."""
        if not isinstance(self.there, float):
            self.there.synchronize()
        return self._values.tolist()


@dataclass
class Training:
    """A model and its optimizer on these processes, as `config` says.

    `failed` becomes 1, on the device, when a loss or a gradient is not finite; from then on updates change nothing.
    `captured`: the passes as a CUDA graph, None where they may not be one.
    """

    config: TrainConfig
    group: Processes
    model: Any
    optimizer: torch.optim.Optimizer
    failed: Tensor
    captured: Captured | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        c = self.config  # checkpointing asks for the state of the random generator, which a graph may not
        if c.cuda_graph and self.device.type == "cuda" and self.group.size == 1 and not c.activation_checkpointing:
            self.captured = Captured(self.passes, self.optimizer.zero_grad)

    @classmethod
    def start(cls, config: TrainConfig, group: Processes, *, drawn: bool = True, **rest: Any) -> Any:
        """A new model, its weights drawn from the seed or, if not `drawn`, left to be loaded; `rest` are a subclass's fields."""
        model = build_model(config.model.replace(z_loss=config.z_loss))
        whole = group.size == 1 and config.micro_batch(1) >= config.batch_size
        for layer in model.recurrent_layers():
            layer.drops_outward = whole  # where several passes add up, it is the sum's that is dropped
        place(
            model, group, seed=config.seed if drawn else None, bf16=uses_bf16(config, group), compiled=config.compile,
            checkpointed=config.activation_checkpointing,
        )  # fmt: skip
        torch.manual_seed(config.seed)
        groups = parameter_groups(model, config.weight_decay / config.learning_rate)  # AdamW multiplies by the rate
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
        return cls(config, group, model, optimizer, torch.zeros((), device=group.device), **rest)

    @property
    def device(self) -> torch.device:
        return self.group.device

    @property
    def bf16(self) -> bool:
        """Whether forward and backward passes compute in bfloat16."""
        return uses_bf16(self.config, self.group)

    def batch(self, ids: Tensor, reset: Tensor | None) -> Batch:
        """This process's windows (b, T), sent to the device without waiting and cut into the pieces of one pass."""
        sent = [v.pin_memory() if v is not None and self.device.type == "cuda" else v for v in (ids, reset)]
        sent = [v if v is None else v.to(self.device, non_blocking=True) for v in sent]
        pieces = [v.split(self.config.micro_batch(self.group.size)) for v in sent if v is not None]
        return list(zip(pieces[0], pieces[1] if reset is not None else [None] * len(pieces[0]), strict=True))

    def passes(self, batch: Batch) -> Tensor:
        """New gradients, and the means (2,) of the cross-entropy and of the z-loss, of this process's part of the batch."""
        self.optimizer.zero_grad()
        sums = torch.zeros(2, device=self.device)
        for ids, reset in batch:
            with precision(self.group, self.bf16):
                out = self.model(input_ids=ids, labels=ids, reset=reset)
            (out.loss / len(batch)).backward()
            extra = out.z_loss if self.config.z_loss else torch.zeros_like(out.loss)
            sums += torch.stack([(out.loss - extra).detach(), extra.detach()]).float() / len(batch)
        for layer in self.model.recurrent_layers():
            if not layer.drops_outward:
                layer.drop_outward()
        return sums

    def update(self, batch: Batch, rate: float) -> Late:
        """Queue one step of AdamW at this learning rate. Cross-entropy, z-loss and norm of the gradient over all processes come late."""
        sums, parameters = (self.captured or self.passes)(batch), list(self.model.parameters())
        total = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = total.full_tensor() if isinstance(total, DTensor) else total
        values = torch.cat([self.group.sum(sums) / self.group.size, norm.float().unsqueeze(0)])
        self.failed = self.failed.maximum((~values.isfinite().all()).float())
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
        # Fused AdamW divides gradients by the one as it reads them, and changes nothing where the other is set.
        self.optimizer.grad_scale = ((norm + 1e-6) / self.config.grad_clip).clamp(min=1.0).float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = self.failed  # type: ignore[attr-defined]
        self.optimizer.step()
        return Late(values)
