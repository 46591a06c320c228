"""Decoding without waiting: states in fixed buffers, tokens drawn on the device, on a GPU one CUDA graph for a whole step."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import bad_type, bad_value
from .cache import Cache
from .config import is_count
from .model import ParaRNNForCausalLM

BURST = 16  # tokens between two looks from the host


class Decoder:
    """A model and the past of `batch_size` sequences, which each step overwrites; its memory does not grow with their length.

    - `temperature`, `top_k`: tokens are drawn from softmax(logits / temperature) among the `top_k` likeliest (None: all);
      temperature 0 takes the likeliest. The same `seed` gives the same tokens on the same device.
    - `compile`: blocks through `torch.compile` first, which takes a minute and joins what lies between two matrix products into
      one kernel.

    On a GPU a step is captured in a CUDA graph; on the CPU it runs as it is. Raises `ArgumentError` and `ArgumentTypeError`.
    """

    @torch.no_grad()
    def __init__(
        self, model: ParaRNNForCausalLM, batch_size: int = 1, *, temperature: float = 1.0, top_k: int | None = None, seed: int = 0,
        compile: bool = False,
    ):  # fmt: skip
        if not isinstance(model, ParaRNNForCausalLM):
            bad_type("model", model, "a ParaRNNForCausalLM")
        if model.config.cache_grows:
            mixer = f"a model with mixer = {model.config.mixer!r}, whose cache grows"
            bad_value("model", mixer, "one whose cache has a constant size", "Use model.generate instead.")
        if not is_count(batch_size):
            bad_value("batch_size", repr(batch_size), "an integer >= 1")
        check_sampling(temperature, top_k)
        self.model, self.batch_size, self.temperature, self.top_k = model, batch_size, temperature, top_k
        self.device = model.lm_head.weight.device
        self.token = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self.cache = Cache()
        first = model(self.token[:, None], past_key_values=self.cache)
        self.logits = first.logits[:, 0].float()
        own = {"memory_format": torch.contiguous_format}
        self.cache.blocks = [tuple(t.clone(**own) for t in block) for block in self.cache.blocks]
        self._drawn = torch.zeros(batch_size, BURST, dtype=torch.int64, device=self.device)
        self._place = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._generator = torch.Generator(self.device)
        self._advance = advance
        if compile:
            tuned: Any = {"coordinate_descent_tuning": True} if self.device.type == "cuda" else None
            self._advance = torch.compile(advance, fullgraph=True, dynamic=False, options=tuned)
        self._step, self._next = self._run_step, self._run_next
        if self.device.type == "cuda":
            self._step, self._next = self._captured(self._run_step), self._captured(self._run_next)
        self._generator.manual_seed(seed)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the past, as before a text begins."""
        for t in (*chain(*self.cache.blocks), self.logits):
            t.zero_()
        self.cache.length = 0

    @torch.no_grad()
    def prefill(self, prompt: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Read `prompt` (B, T) from an empty past, in parallel over time -> logits (B, V) float32 of what follows.

        `attention_mask` (B, T): 0 for padding on the left. The tensor returned is overwritten by the next call.
        """
        if not isinstance(prompt, Tensor) or prompt.dim() != 2 or prompt.shape[0] != self.batch_size:
            bad_value("prompt", prompt, f"token ids of shape (B, T) with B = batch_size = {self.batch_size}")
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device)
        made = Cache()
        out = self.model(prompt.to(self.device), attention_mask, made, logits_to_keep=1)
        for buffer, value in zip(chain(*self.cache.blocks), chain(*made.blocks), strict=True):
            buffer.copy_(value)
        self.cache.length = made.length
        return self.logits.copy_(out.logits[:, 0])

    @torch.no_grad()
    def step(self, token: Tensor) -> Tensor:
        """Read one token (B,) -> logits (B, V) float32 of what follows, overwritten by the next call."""
        if not isinstance(token, Tensor) or tuple(token.shape) != (self.batch_size,):
            bad_value("token", token, f"token ids of shape (B,) = ({self.batch_size},)")
        self.token.copy_(token)
        self._step()
        self.cache.length += 1
        return self.logits

    @torch.no_grad()
    def sample(self, count: int) -> Tensor:
        """Draw `count` tokens, each after reading the one before it -> (B, count) int64 on the device, without waiting for it."""
        if not is_count(count):
            bad_value("count", repr(count), "an integer >= 1")
        pieces = []
        for start in range(0, count, BURST):
            burst = min(BURST, count - start)
            self._place.zero_()
            for _ in range(burst):
                self._next()
            pieces.append(self._drawn[:, :burst].clone())
        self.cache.length += count
        return torch.cat(pieces, 1)

    def _run_step(self) -> None:
        base = self.model.model
        x = base.embed_tokens(self.token).unsqueeze(1)
        for block, past in zip(base.layers, self.cache.blocks, strict=True):
            x = self._advance(block, x, past)
        self.logits.copy_(self.model.lm_head(base.norm(x)).squeeze(1))

    def _run_next(self) -> None:
        self.token.copy_(draw(self.logits, self.temperature, self.top_k, self._generator))
        self._drawn.index_copy_(1, self._place, self.token.unsqueeze(1))
        self._place.add_(1)
        self._run_step()

    def _captured(self, run: Callable[[], None]) -> Callable[[], None]:
        """`run` as a CUDA graph, captured after it has run often enough to have compiled and allocated everything."""
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self._generator)
            self._place.zero_()
            with torch.cuda.graph(graph):
                run()
        return graph.replay


def advance(block: nn.Module, x: Tensor, past: tuple[Tensor, ...]) -> Tensor:
    """One block on one token: x (B, 1, d) -> (B, 1, d); the tensors of `past` are overwritten."""
    x, after = block(x, past)
    for buffer, value in zip(past, after, strict=True):
        buffer.copy_(value)
    return x


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """Tokens (B,) ~ softmax(logits / temperature) among the `top_k` likeliest, logits (B, V).

    argmax(logits / temperature - log e) with e ~ Exp(1), that is plus Gumbel noise, waits for no sum on the host.
    """
    if temperature == 0:
        return logits.argmax(-1)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    scaled = (logits - logits.amax(-1, True)).double() / temperature  # no temperature > 0 can overflow
    return (scaled - torch.empty_like(scaled).exponential_(generator=generator).log_()).argmax(-1)


def check_sampling(temperature: float, top_k: int | None) -> None:
    """Raise `ArgumentError` for a temperature or a top_k that cannot be."""
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        bad_value("temperature", repr(temperature), "a number >= 0; 0 takes the likeliest token")
    if top_k is not None and not is_count(top_k):
        bad_value("top_k", repr(top_k), "None or an integer >= 1")
