"""Sampling from a model: the prompt in one parallel pass, then one constant-time step a token."""

from __future__ import annotations

import codecs
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import bad_type, bad_value
from .config import is_count
from .decode import BURST, Decoder
from .model import ParaRNNForCausalLM


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
    _check(model, prompt, max_new_tokens)
    decoder = Decoder(model, temperature=temperature, top_k=top_k, seed=seed)
    decoder.prefill(prompt.to(torch.int64)[None])
    burst = BURST if decoder.device.type == "cuda" else 1
    tokens: list[int] = []
    while len(tokens) < max_new_tokens:
        for token in decoder.sample(min(burst, max_new_tokens - len(tokens)))[0].tolist():
            tokens.append(token)
            if (on_token is not None and on_token(token)) or token == model.config.eos_token_id:
                return tokens
    return tokens


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


def _check(model: ParaRNNForCausalLM, prompt: Tensor, max_new_tokens: int) -> None:
    if not isinstance(prompt, Tensor) or prompt.dim() != 1 or prompt.numel() == 0:
        bad_value("prompt", prompt, "token ids of shape (T,), at least one")
    vocab = model.config.vocab_size
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab:
        bad_value("prompt", f"ids from {int(prompt.min())} to {int(prompt.max())}", f"ids below vocab_size = {vocab}")
    if not is_count(max_new_tokens):
        bad_value("max_new_tokens", repr(max_new_tokens), "an integer >= 1")
