"""Sampling from a model: the prompt in one parallel pass, then one step a token."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..errors import bad_type, bad_value
from .cache import Cache
from .config import is_count
from .decode import BURST, Decoder, check_sampling, draw
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
    _check(model, prompt, max_new_tokens, seed)
    source = _step_by_step if model.config.cache_grows else _in_bursts
    tokens: list[int] = []
    for token in source(model, prompt.to(torch.int64)[None], max_new_tokens, temperature, top_k, seed):
        tokens.append(token)
        if (on_token is not None and on_token(token)) or token == model.config.eos_token_id:
            break
    return tokens


def _in_bursts(
    model: ParaRNNForCausalLM, prompt: Tensor, count: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[int]:
    """`count` tokens after `prompt` (1, T) by a `Decoder`."""
    decoder = Decoder(model, temperature=temperature, top_k=top_k, seed=seed)
    decoder.prefill(prompt)
    burst = BURST if decoder.device.type == "cuda" else 1
    for made in range(0, count, burst):
        yield from decoder.sample(min(burst, count - made))[0].tolist()


@torch.no_grad()
def _step_by_step(
    model: ParaRNNForCausalLM, prompt: Tensor, count: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[int]:
    """The same from a cache that grows."""
    check_sampling(temperature, top_k)
    device, cache = model.lm_head.weight.device, Cache()
    generator, token = torch.Generator(device).manual_seed(seed), prompt.to(device)
    for _ in range(count):
        logits = model(token, past_key_values=cache, logits_to_keep=1).logits[:, 0].float()
        token = draw(logits, temperature, top_k, generator)[:, None]
        yield int(token)


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

    ids = torch.tensor(list(prompt.encode("utf-8", "surrogateescape")))  # bytes of a shell that are no UTF-8 are bytes
    generate(model, ids, max_new_bytes, temperature=temperature, top_k=top_k, seed=seed, on_token=on_token)
    hand_on(decoder.decode(b"", final=True))
    return "".join(pieces)


def _check(model: ParaRNNForCausalLM, prompt: Tensor, max_new_tokens: int, seed: int) -> None:
    if not isinstance(prompt, Tensor) or prompt.dim() != 1 or prompt.numel() == 0:
        bad_value("prompt", prompt, "token ids of shape (T,), at least one")
    vocab = model.config.vocab_size
    if int(prompt.min()) < 0 or int(prompt.max()) >= vocab:
        bad_value("prompt", f"ids from {int(prompt.min())} to {int(prompt.max())}", f"ids below vocab_size = {vocab}")
    if not is_count(max_new_tokens):
        bad_value("max_new_tokens", repr(max_new_tokens), "an integer >= 1")
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        bad_value("seed", repr(seed), "an integer from -2^63 to 2^64 - 1")
