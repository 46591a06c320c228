"""What is trained: a suite is a list of trials, each of which decides one run completely."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..cells.find import find_cell
from ..errors import bad_type, bad_value
from ..layers import bias_ranges
from ..lm.config import checked_names, is_count
from .models import SOLVERS, parts
from .task import METRICS, Samples, find_task

COUNTS = ("length", "steps", "validate_every", "batch_size", "validation_samples", "test_samples", "hidden_size", "num_layers", "num_heads")  # fmt: skip
VARIED = {"seed": "seeds", "model": "models", "learning_rate": "learning_rates"}
"""Fields of a trial of which an entry of a suite lists several, and the name of the list."""


@dataclass(frozen=True)
class Trial:
    """One training of a model on a task: AdamW with a cosine to zero, the gradient's norm clipped to 1.

    - `task` and its `options`; `model` as in `build_model`; `seed` of weights, training samples and their order.
    - `length` of training samples, or, with `shortest`, lengths from there to `length`; `curriculum`: lengths before that, each until
      the last answers are right in more than the share `learned` of the samples (a running mean); `test_lengths`.
    - `train_samples`: a fixed set, taken in a new order each epoch; None: new samples all the time.
    - `validation_samples` (of the training length) every `validate_every` steps; a perfect score ends the training, if `stop_early`.
    - `probe`: the length of the sequences on which it is counted at each validation how many sweeps the recurrence takes, in chunks of 16,
      and measured how much faster than the loop a training step solves it; None: sweeps on the last training batch, as it was solved.
    - `metric` that is validated and reported: "token", "sequence" or "last"; None: the task's.
    - `hidden_size`, `num_layers`, `num_heads`, `recurrent_clip`, `initial_bias`, `initial_recurrent`, `solver`: the model's.

    The defaults are the paper's, as far as it gives them: its number of epochs is not known. Raises `ArgumentError` and
    `ArgumentTypeError`. Source: Danieli et al. 2025 (ParaRNN, arXiv 2510.21450).
    """

    task: str
    model: str
    seed: int = 0
    learning_rate: float = 5e-4
    options: dict[str, Any] | None = None
    length: int = 100
    shortest: int | None = None
    curriculum: Sequence[int] = ()
    learned: float = 0.95
    test_lengths: Sequence[int] = (100,)
    train_samples: int | None = 10_000
    validation_samples: int = 1000
    test_samples: int = 100_000
    steps: int = 12_500
    validate_every: int = 625
    stop_early: bool = True
    metric: str | None = None
    probe: int | None = None
    batch_size: int = 16
    weight_decay: float = 1e-6
    hidden_size: int = 64
    num_layers: int = 1
    num_heads: int = 1
    recurrent_clip: float | None = 0.9
    initial_bias: dict[str, Any] | None = None
    initial_recurrent: dict[str, float] | None = None
    solver: str = "parallel"

    def __post_init__(self) -> None:
        for name in COUNTS:
            if not is_count(getattr(self, name)):
                bad_value(name, repr(getattr(self, name)), "an integer >= 1")
        if self.train_samples is not None and not (
            is_count(self.train_samples) and self.train_samples >= self.batch_size
        ):
            bad_value(
                "train_samples", repr(self.train_samples), f"None or an integer >= batch_size = {self.batch_size}"
            )
        for name, most in (("learning_rate", math.inf), ("weight_decay", math.inf), ("learned", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < most:
                bad_value(name, repr(value), "a finite number >= 0" + (" and < 1" if most == 1 else ""))
        counts = lambda value: isinstance(value, (list, tuple)) and all(map(is_count, value))
        if not counts(self.test_lengths) or not self.test_lengths:
            bad_value("test_lengths", repr(self.test_lengths), "a list of integers >= 1")
        if not counts(self.curriculum):
            bad_value("curriculum", repr(self.curriculum), "a list of integers >= 1, possibly empty")
        if self.curriculum and self.train_samples is not None:
            fixed = str(self.train_samples)
            bad_value("train_samples", fixed, "None where there is a curriculum", "A fixed set has one length.")
        if not isinstance(self.stop_early, bool):
            bad_type("stop_early", self.stop_early, "True or False")
        if self.probe is not None and not is_count(self.probe):
            bad_value("probe", repr(self.probe), "None or an integer >= 1")
        if self.metric is not None and self.metric not in METRICS:
            bad_value("metric", repr(self.metric), f"None or one of {', '.join(METRICS)}")
        if not isinstance(self.options, (dict, type(None))):
            bad_type("options", self.options, "an object of the task's options")
        object.__setattr__(self, "options", self.options or {})
        if self.shortest is not None and "shortest" in (self.options or {}):
            bad_value("options", "shortest, which the trial has, too", "it in one of both places")
        if not isinstance(self.solver, str) or self.solver not in SOLVERS:
            bad_value("solver", repr(self.solver), f"one of {', '.join(SOLVERS)}")
        self._check_initial()
        object.__setattr__(self, "test_lengths", list(self.test_lengths))
        object.__setattr__(self, "curriculum", list(self.curriculum))
        for length in (*self.curriculum, self.length):
            self.samples("train", length)
        if self.probe is not None:
            self.samples("validation", self.probe)
        for length in self.test_lengths:
            self.samples("test", length)

    def _check_initial(self) -> None:
        kind, name = parts(self.model)
        cell = None if kind == "torch" or name == "attention" else find_cell(name)
        vectors = cell.params if cell is not None and cell.structure == "channelwise" else ()
        if cell is not None:
            bias_ranges(cell, self.initial_bias)
        elif self.initial_bias:
            bad_value("initial_bias", repr(self.initial_bias), f"none for {self.model}, which has no cell")
        given = self.initial_recurrent
        if not isinstance(given, (dict, type(None))):
            bad_type("initial_recurrent", given, "an object of numbers by the names of the cell's parameters")
        for name, value in (given or {}).items():
            if name not in vectors:
                known = f"one of {', '.join(vectors) or 'none'}, the vectors of parameters of {self.model}"
                bad_value("initial_recurrent", repr(name), known)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                bad_value(f"initial_recurrent of {name}", repr(value), "a finite number")
        object.__setattr__(self, "initial_bias", self.initial_bias or {})
        object.__setattr__(self, "initial_recurrent", given or {})

    def learning_rate_at(self, step: int) -> float:
        """The rate of step 0, 1, ...: half a cosine, zero after the last."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def samples(self, split: str, length: int) -> Samples:
        """Those of a split; all trials share validation and test samples."""
        varied = {"shortest": self.shortest} if self.shortest is not None and split != "test" else {}
        seed = self.seed if split == "train" else 0
        return find_task(self.task).build(seed, length=length, split=split, **(self.options or {}), **varied)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)

    @property
    def key(self) -> str:
        """The same text for the same trial, another for another."""
        return json.dumps(self.to_dict(), sort_keys=True)


def trials(values: Any) -> list[Trial]:
    """The trials of a suite: {"defaults": {...}, "runs": [{...}, ...]}, of fields of `Trial`.

    Each run, the defaults filled in, stands for all combinations of its "models", "seeds" and "learning_rates"; the rates of a
    seed stand together. Raises `ArgumentError` and `ArgumentTypeError`.
    """
    if (
        not isinstance(values, dict)
        or not set(values) <= {"defaults", "runs"}
        or not isinstance(values.get("runs"), list)
    ):
        bad_value("suite", repr(values)[:60], 'an object {"defaults": {...}, "runs": [{...}, ...]}')
    found: list[Trial] = []
    for run in values["runs"]:
        for given in (run, values.get("defaults", {})):
            if not isinstance(given, dict):
                bad_type("suite", given, "an object of fields in 'defaults' and in each of 'runs'")
        fields = {**values.get("defaults", {}), **run}
        lists = {one: fields.pop(many) for one, many in VARIED.items() if many in fields}
        for one, listed in lists.items():
            if not isinstance(listed, list) or not listed:
                bad_value(VARIED[one], repr(listed), "a list of at least one")
        for chosen in itertools.product(*lists.values()):
            found.append(Trial(**checked_names(Trial, {**fields, **dict(zip(lists, chosen, strict=True))})))
    return found


BARE, BLOCK = (
    [f"{kind}:gru", f"{kind}:lstm", f"{kind}:mingru", f"{kind}:parashoot.tasks.cells:mingru_negative", "torch:gru", "torch:lstm"]
    for kind in ("cell", "block")
)  # fmt: skip
LONGER = [100, 200, 400]

SUITES: dict[str, dict[str, Any]] = {
    "paper": {
        "defaults": {"seeds": [0, 1, 2], "learning_rates": [3e-3, 5e-4]},
        "runs": [
            {"task": "keep_nth", "models": BARE, "recurrent_clip": None, "learning_rates": [1e-2, 3e-3, 5e-4]},
            {"task": "parity", "models": BARE, "recurrent_clip": None, "learning_rates": [5e-4], "test_lengths": LONGER},
            {"task": "mqar", "models": [*BLOCK, "block:attention"]},
            {"task": "khop", "models": [*BLOCK, "block:attention"], "steps": 7000},
            {
                "task": "khop", "models": [*BLOCK, "block:attention"], "options": {"k": 2, "vocab": 5}, "steps": 40_000,
                "validate_every": 2500, "learning_rates": [2e-3, 6e-3], "weight_decay": 0.1,
            },
        ],
    },
    "tracking": {
        "defaults": {
            "models": BARE, "seeds": [0, 1, 2], "learning_rates": [1e-3, 3e-3], "recurrent_clip": None, "length": 40,
            "test_lengths": [40, 64, 128, 256], "train_samples": None, "test_samples": 10_000, "batch_size": 64,
        },
        "runs": [
            {"task": "parity"},
            {"task": "cycle", "shortest": 3},
            {"task": "arithmetic", "shortest": 3},
            {"task": "brackets", "shortest": 3},
            *({"task": name} for name in ("z60", "s3", "s5", "a5")),
        ],
    },
    "words": {
        "defaults": {
            "models": ["cell:headrotor", "cell:headgru", "cell:headlstm", *BARE], "seeds": [0, 1, 2], "learning_rates": [3e-3],
            "recurrent_clip": None, "hidden_size": 128, "length": 40, "curriculum": [2, 4, 8, 16, 24, 32], "test_lengths": [40, 256, 1024],
            "metric": "sequence", "train_samples": None, "test_samples": 1000, "batch_size": 128, "steps": 2000, "validate_every": 500,
            "stop_early": False, "probe": 1024,
        },
        "runs": [{"task": "a5"}, {"task": "s5", "steps": 4000}],
    },
    "arithmetic": {
        "defaults": {
            "models": ["block:headrotor"], "seeds": [0, 1, 2], "learning_rates": [3e-3], "recurrent_clip": None, "num_layers": 2,
            "initial_bias": {"z": 3.0}, "length": 39, "curriculum": [3, 7, 13, 21, 31], "test_lengths": [39, 127, 255],
            "train_samples": None, "test_samples": 2000, "batch_size": 128, "weight_decay": 0.1, "steps": 15_000,
            "validate_every": 1500, "stop_early": False,
        },
        "runs": [{"task": "arithmetic", "options": {"every": True}}],
    },
    "cycle": {
        "defaults": {
            "models": ["cell:headrotor"], "seeds": [0, 1, 2], "learning_rates": [3e-3], "recurrent_clip": None, "hidden_size": 128,
            "length": 40, "shortest": 2, "curriculum": [2, 4, 8, 16, 24, 32], "test_lengths": [40, 100, 127, 255, 256], "train_samples": None,
            "test_samples": 2000, "batch_size": 128, "weight_decay": 0.1, "steps": 4800, "validate_every": 1200, "stop_early": False,
        },
        "runs": [{"task": "cycle"}],
    },
    "brackets": {
        "defaults": {
            "models": ["block:headlstm"], "seeds": [0, 1, 2], "learning_rates": [3e-3], "recurrent_clip": None, "num_layers": 3,
            "length": 40, "curriculum": [5, 9, 13, 21, 31], "learned": 0.9,
            "test_lengths": [40, 64, 127, 255], "train_samples": None, "test_samples": 2000, "batch_size": 128, "weight_decay": 0.1,
            "steps": 6000, "validate_every": 500, "stop_early": False,
        },
        "runs": [{"task": "brackets", "options": {"every": True}}],
    },
    "recall": {
        "defaults": {"seeds": [0, 1, 2], "learning_rates": [3e-3], "train_samples": None, "batch_size": 64},
        "runs": [
            {
                "task": "keep_nth", "models": ["cell:gru"], "initial_bias": {"z": -3.0, "r": 4.0, "c": 4.2},
                "initial_recurrent": {"a_z": 11.0, "a_r": -10.0, "a_c": -10.5}, "recurrent_clip": None, "length": 16,
                "curriculum": [8, 12], "learned": 0.99, "test_lengths": [16, 100], "steps": 30_000, "validate_every": 2000,
                "stop_early": False, "learning_rates": [1e-3],
            },
            {
                "task": "keep_nth", "models": ["cell:lstm"], "initial_bias": {"f": 3.3, "z": 8.0, "o": 9.0},
                "initial_recurrent": {"a_z": -9.0, "p_f": -14.6, "p_o": -12.0}, "recurrent_clip": None, "length": 24,
                "curriculum": [8, 12, 16, 20], "learned": 0.95, "test_lengths": [24, 100], "steps": 120_000, "validate_every": 5000,
                "stop_early": False, "learning_rates": [1e-3],
            },
            {
                "task": "mqar", "models": ["block:lstm", "block:gru"], "curriculum": [8, 16, 32, 64], "learned": 0.9, "steps": 20_000,
                "validate_every": 1000,
            },
        ],
    },
    "quick": {
        "defaults": {
            "seeds": [0], "learning_rates": [1e-2], "recurrent_clip": None, "hidden_size": 16, "length": 16, "train_samples": None,
            "validation_samples": 500, "test_samples": 1000, "steps": 600, "validate_every": 50, "batch_size": 64,
        },
        "runs": [
            {"task": "parity", "models": ["cell:gru", "cell:lstm", "cell:mingru"], "test_lengths": [16, 32, 64]},
            {"task": "keep_nth", "models": ["cell:lstm", "cell:mingru"], "options": {"n": 1, "vocab": 8}, "test_lengths": [16]},
            {
                "task": "s3", "models": ["cell:headrotor", "cell:mingru"], "curriculum": [2, 4, 8], "metric": "sequence", "steps": 400,
                "stop_early": False, "test_lengths": [16, 64, 256],
            },
        ],
    },
}  # fmt: skip


def find_suite(name: str) -> list[Trial]:
    """The trials of one of `SUITES`, or of a JSON file. Raises `ArgumentError` and `ArgumentTypeError`."""
    if name in SUITES:
        return trials(SUITES[name])
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        bad_value("SUITE", repr(name), f"one of {', '.join(SUITES)}, or an existing .json file")
    try:
        return trials(json.loads(path.read_bytes()))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        bad_value("SUITE", f"'{name}', which is not JSON ({e})", "a JSON object")
