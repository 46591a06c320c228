"""Text to tokens: its bytes as they are, or a byte-pair encoding from a `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import bad_value, needs

EOT = "<|endoftext|>"
SAMPLE = 200_000_000


class Bytes:
    """Each byte is its own token: 256 of them, none that begins a document."""

    vocab_size, eot = 256, None

    def encode(self, texts: list[bytes]) -> list[bytes]:
        """texts -> tokens, one buffer of uint8 a text."""
        return texts


class Subwords:
    """A tokenizer of the `tokenizers` library, with the token `eot` that begins each document."""

    def __init__(self, tokenizer: Any, eot: str):
        self.tokenizer, self.eot = tokenizer, tokenizer.token_to_id(eot)
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        if self.eot is None:
            bad_value("--eot", repr(eot), "a token of the tokenizer", "Name the one that ends a text with it.")
        tokenizer.encode_special_tokens = True  # one that stands in a text is text

    @classmethod
    def from_file(cls, path: Path, eot: str = EOT) -> Subwords:
        """The tokenizer in a `tokenizer.json`. Raises `ArgumentError` if it is none, or has no token `eot`."""
        return cls(read_tokenizer(path), eot)

    @classmethod
    def train(cls, texts: Iterator[bytes], vocab_size: int) -> Subwords:
        """A byte-level BPE of `vocab_size` tokens, trained on the first 200 MB of `texts`."""
        library = needs("a byte-pair encoding", "data", "tokenizers")
        least = 257
        if vocab_size < least:
            bad_value("--train-bpe", str(vocab_size), f"at least {least}: every byte and {EOT}")
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(_sample(texts), trainer)
        return cls(tokenizer, EOT)

    def encode(self, texts: list[bytes]) -> list[list[int]]:
        """texts -> tokens, one list a text. Raises `ArgumentError` for bytes that are not UTF-8."""
        return [e.ids for e in self.tokenizer.encode_batch([_decoded(t) for t in texts], add_special_tokens=False)]


def read_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer` from its `tokenizer.json`. Raises `ArgumentError` if it is none."""
    library = needs("a byte-pair encoding", "data", "tokenizers")
    if not path.is_file():
        bad_value("tokenizer", f"'{path}'", "an existing tokenizer.json")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as e:  # the library raises bare exceptions
        bad_value("tokenizer", f"'{path}', which cannot be read ({str(e)[:100]})", "a tokenizer.json")
    tokenizer.no_truncation()  # as transformers writes them after a call that cut or padded
    tokenizer.no_padding()
    return tokenizer


def _sample(texts: Iterator[bytes]) -> Iterator[str]:
    read = 0
    for text in texts:
        yield _decoded(text)
        read += len(text)
        if read >= SAMPLE:
            return


def _decoded(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as e:
        bad_value("text", f"bytes that are not UTF-8 ({e})", "UTF-8", "Leave the tokenizer out to train on bytes.")
