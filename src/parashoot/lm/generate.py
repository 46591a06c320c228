"""Sampling from a model: the prompt in one parallel pass, then one constant-time step a token."""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import bad_type, bad_value
from .config import is_count
from .model import ParaRNNForCausalLM


@torch.no_grad()
def generate(
    model: ParaRNNForCausalLM,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    on_token: Callable[[int], bool | None] | None = None,
) -> list[int]:
    """Sample up to `max_new_tokens` tokens after `prompt` (T,): p ~ softmax(logits / temperature), among the `top_k` likeliest.

    `temperature` 0 takes the likeliest. The same `seed` gives the same tokens. Ends early after `eos_token_id` of the
    configuration, or when `on_token`, called with each token, returns True. Raises `ArgumentError`.
    """
    _check(model, prompt, max_new_tokens, temperature, top_k)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        out = model(prompt.to(device, torch.int64)[None])
        logits, cache, tokens = out.logits[:, -1], out.cache, []
        while True:
            token = _sample(logits[0].float().cpu(), temperature, top_k, generator)
            tokens.append(token)
            stop = on_token is not None and bool(on_token(token))
            if stop or token == model.config.eos_token_id or len(tokens) == max_new_tokens:
                return tokens
            logits, cache = model.step(torch.tensor([token], device=device), cache)
    finally:
        model.train(was_training)


def generate_text(
    model: ParaRNNForCausalLM,
    prompt: str,
    max_new_bytes: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue `prompt` with a byte-level model; the continuation alone, bytes that are no UTF-8 shown as U+FFFD.

    Ends after the string `stop`. `on_text` receives each piece of text as soon as its characters are whole.
    """
    if not isinstance(prompt, str):
        bad_type("prompt", prompt, "a string")
    if not prompt:
        bad_value("prompt", "''", "at least one character", "The model continues a text; a newline will do.")
    if stop is not None and not stop:
        bad_value("stop", "''", "None or at least one character")
    if model.config.vocab_size < 256:
        bad_value("vocab_size", str(model.config.vocab_size), "at least 256, one token for each byte")
    ending = stop.encode() if stop else None
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    produced, pieces = bytearray(), []

    def hand_on(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    def on_token(token: int) -> bool:
        produced.extend(bytes([token]) if token < 256 else b"\xff")
        hand_on(decoder.decode(bytes(produced[-1:])))
        return ending is not None and produced.endswith(ending)

    ids = torch.tensor(list(prompt.encode()))
    generate(model, ids, max_new_bytes, temperature=temperature, top_k=top_k, seed=seed, on_token=on_token)
    hand_on(decoder.decode(b"", final=True))
    return "".join(pieces)


def _check(
    model: ParaRNNForCausalLM, prompt: Tensor, max_new_tokens: int, temperature: float, top_k: int | None
) -> None:
    if not isinstance(prompt, Tensor) or prompt.dim() != 1 or prompt.numel() == 0:
        bad_value("prompt", prompt, "token ids of shape (T,), at least one")
    vocab = model.config.vocab_size
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab:
        bad_value("prompt", f"ids from {int(prompt.min())} to {int(prompt.max())}", f"ids below vocab_size = {vocab}")
    if not is_count(max_new_tokens):
        bad_value("max_new_tokens", repr(max_new_tokens), "an integer >= 1")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        bad_value("temperature", repr(temperature), "a number >= 0; 0 takes the likeliest token")
    if top_k is not None and not is_count(top_k):
        bad_value("top_k", repr(top_k), "None or an integer >= 1")


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """A token from logits (V,)."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    scaled = (logits - logits.max()).double() / temperature  # no temperature > 0 can overflow
    return int(torch.multinomial(torch.softmax(scaled, 0), 1, generator=generator))
