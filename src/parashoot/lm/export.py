"""`parashoot export`: a checkpoint as a directory that transformers loads, with the tokenizer that its text needs."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from ..errors import bad_value, needs
from .checkpoint import FACTS, load_model
from .data import TOKENIZER
from .prepare import check_new, new_directory
from .tokenizer import EOT, read_tokenizer

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export(checkpoint: str | Path, directory: str | Path, precision: str = "fp32") -> Any:
    """Write the model of a checkpoint, of a run's latest one or of a saved directory to a new `directory`; returns the model.

    `AutoModelForCausalLM` and `AutoTokenizer` load it after `import parashoot.lm`. Weights are stored as `precision`, "fp32" or
    "bf16". The token that begins documents becomes `bos_token_id` and `eos_token_id` where the configuration names none. Raises
    `ArgumentError`.
    """
    if precision not in PRECISIONS:
        bad_value("dtype", repr(precision), f"one of {', '.join(PRECISIONS)}")
    check_new(Path(directory))
    model = load_model(checkpoint)
    tokenizer, config = text_tokenizer(checkpoint, model.config), model.config
    if config.eos_token_id is None and tokenizer.eos_token_id is not None:
        config.bos_token_id = config.eos_token_id = tokenizer.eos_token_id
        model.generation_config = GenerationConfig.from_model_config(config)
    with new_directory(Path(directory)) as beside:
        try:
            model.to(PRECISIONS[precision]).save_pretrained(beside)
        except SafetensorError as e:  # a full disk, for one
            raise OSError(f"the model could not be written to '{directory}' ({e})") from e
        tokenizer.save_pretrained(beside)
    return model


def tokenizer_file(checkpoint: str | Path) -> Path | None:
    """The `tokenizer.json` of a run, of one of its checkpoints or of a saved directory; None where tokens are bytes."""
    home = Path(checkpoint).resolve()  # of "." or of a link there is no parent to look in
    homes = [home, home.parent] if (home / FACTS).is_file() else [home]  # older checkpoints share that of their run
    return next((h / TOKENIZER for h in homes if (h / TOKENIZER).exists()), None)


def check_tokenizer(checkpoint: str | Path, data: Path | None) -> None:
    """Raise `ArgumentError` if the model at `checkpoint` is known to have another tokenizer than data, whose file is given or None for
    bytes: its loss on them would mean nothing."""
    mine = tokenizer_file(checkpoint)
    if (mine is None and (data is None or (Path(checkpoint) / "config.json").is_file())) or mine == data:
        return  # a directory that transformers wrote may be without
    model = lambda path: json.loads((byte_tokenizer() if path is None else read_tokenizer(path)).to_str())["model"]
    if model(mine) != model(data):
        name = lambda path: "bytes" if path is None else f"'{path}'"
        bad_value("data", f"tokens of {name(data)}", f"those of {name(mine)}, which '{checkpoint}' was trained on",
                  "Prepare the text with --tokenizer.")  # fmt: skip


def text_tokenizer(checkpoint: str | Path, config: Any) -> Any:
    """The tokenizer of the model at `checkpoint` as one of transformers; `config` is the model's. Raises `ArgumentError`."""
    path = tokenizer_file(checkpoint)
    if path is not None and (path.parent / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(path.parent)
    inner, eos = byte_tokenizer() if path is None else read_tokenizer(path), config.eos_token_id
    if path is not None and eos is None:
        eos = inner.token_to_id(EOT)
    name = None if eos is None or path is None else inner.id_to_token(eos)
    names = {} if name is None else {"bos_token": name, "eos_token": name}
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)


def byte_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` whose tokens are the bytes of UTF-8, each its own number; broken ones are decoded as U+FFFD."""
    library = needs("a tokenizer of bytes", "data", "tokenizers")
    printed, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, count(256)
    names = {chr(b if b in printed else next(others)): b for b in range(256)}  # how ByteLevel writes each byte
    tokenizer = library.Tokenizer(library.models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer
