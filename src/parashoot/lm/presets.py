"""Models and trainings by name: the demo, small models of bytes, and the sizes of the paper (Danieli et al. 2025, arXiv 2510.21450)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import bad_value
from .config import MIXERS, ParaRNNConfig, foreign_fields
from .train_config import TrainConfig

BPE_VOCABULARY = 50432

PRESETS = {
    "demo": ParaRNNConfig(vocab_size=256, hidden_size=128, num_hidden_layers=2, intermediate_size=384),
    "5M": ParaRNNConfig(vocab_size=256, hidden_size=256, num_hidden_layers=6),
    "15M": ParaRNNConfig(vocab_size=256, hidden_size=448, num_hidden_layers=6),
    "30M": ParaRNNConfig(vocab_size=256, hidden_size=512, num_hidden_layers=9),
    "60M": ParaRNNConfig(vocab_size=256, hidden_size=640, num_hidden_layers=12),
    "125M": ParaRNNConfig(vocab_size=256, hidden_size=768, num_hidden_layers=18),
    "400M": ParaRNNConfig(vocab_size=BPE_VOCABULARY, hidden_size=1024, num_hidden_layers=24),
    "1B": ParaRNNConfig(vocab_size=BPE_VOCABULARY, hidden_size=2048, num_hidden_layers=24),
    "2.9B": ParaRNNConfig(vocab_size=BPE_VOCABULARY, hidden_size=2560, num_hidden_layers=32, num_heads=2),
    "7B": ParaRNNConfig(vocab_size=BPE_VOCABULARY, hidden_size=4096, num_hidden_layers=32),
}


def preset(name: str, **changes: Any) -> ParaRNNConfig:
    """A copy of the configuration `name` of `PRESETS` with other values for some fields: `preset("400M", cell="lstm")`.

    With another `mixer` the fields that it has no use for take their defaults.
    Sizes from 5M to 125M read bytes; another `vocab_size` V adds 2 (V - 256) `hidden_size` parameters, half of that with tied
    embeddings. Raises `ArgumentError`.
    """
    if name not in PRESETS:
        bad_value("preset", repr(name), f"one of {', '.join(PRESETS)}")
    mixer = changes.get("mixer")
    return PRESETS[name].replace(**{**(foreign_fields(mixer) if mixer in MIXERS else {}), **changes})


DEMO = TrainConfig(
    model=PRESETS["demo"],
    steps=2900,
    batch_size=4,
    sequence_length=256,
    learning_rate=6e-3,
    weight_decay=6e-4,
    warmup=0.05,
    z_loss=0.0,
)

TRAININGS = {"demo": DEMO}


def find_training(name: str) -> tuple[str, TrainConfig]:
    """A short name and the configuration: one of `TRAININGS`, or a JSON file of `TrainConfig` fields.

    In the file, "model" is an object of `ParaRNNConfig` fields or the name of one of `PRESETS`.
    """
    if name in TRAININGS:
        return name, TRAININGS[name]
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        bad_value(
            "training", f"'{name}'", f"one of {', '.join(TRAININGS)}, or an existing .json file of TrainConfig fields"
        )
    try:
        values = json.loads(path.read_bytes())
    except ValueError as e:
        bad_value("training", f"'{name}', which is not JSON ({e})", "a JSON object of TrainConfig fields")
    if isinstance(values, dict) and isinstance(values.get("model"), str):
        values["model"] = preset(values["model"])
    return path.stem, TrainConfig.from_dict(values)
