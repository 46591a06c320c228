"""Every command of docs/training.md runs, in its order, on settings made small."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from parashoot.cli import main
from parashoot.lm import sources

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "training.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
SMALL = {"steps": 3, "batch_size": 4, "sequence_length": 24, "compile": False}
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with what the commands refer to, the network replaced."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "docs", "docs")
    shutil.copy(ROOT / "README.md", "README.md")
    Path("recipes").mkdir()
    small, large = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    given = {Path("small.json"): small, Path("7b.json"): large} | {
        Path("recipes") / p.name: p.read_text() for p in ROOT.glob("recipes/*.json")
    }
    for path, text in given.items():
        config = json.loads(text)
        model = {"vocab_size": 500} if config["model"] == "7B" else config["model"]
        heads = {"head_dim": 8} if "head_dim" in model else {}
        path.write_text(json.dumps({**config, **SMALL, "model": {**model, **TINY, **heads}}))
    rows = [{"text": f"{k} and {k} are {2 * k}. " * 5} for k in range(300)]
    Path("corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: rows))
    monkeypatch.setattr(sources, "_fetched_enwik8", lambda: np.random.default_rng(0).bytes(10**5))
    monkeypatch.setattr(sources, "ENWIK8_SPLITS", {k: v // 1000 for k, v in sources.ENWIK8_SPLITS.items()})
    return tmp_path


def test_every_command_runs(place, capsys):
    pytest.importorskip("tokenizers")
    assert len(COMMANDS) > 15
    for line in COMMANDS:
        words = shlex.split(line.replace("--steps 200", "--steps 2").replace("step-000300", "step-000003"))
        if "parashoot.lm.lm_eval" in words:  # its tasks come from the network: test_lm_eval.py
            continue
        arguments = words[1:] if words[0] == "parashoot" else words[words.index("parashoot") + 1 :]
        assert main(arguments) == 0, (line, capsys.readouterr().err)
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, {})
    assert {p.name for p in (place / "runs").iterdir()} == {
        "small",
        "shorter",
        "two",
        "7b",
        "enwik8-paragru",
        "enwik8-paralstm",
        "enwik8-transformer",
        "enwik8-gated-delta",
    }


def test_a_model_of_subwords_trains_and_continues_text(place, capsys):
    pytest.importorskip("tokenizers")
    assert main(["data", "bpe", "--jsonl", "corpus.jsonl", "--train-bpe", "300"]) == 0
    config = json.loads(Path("small.json").read_text())
    config["model"]["vocab_size"] = 300
    Path("bpe.json").write_text(json.dumps(config))
    assert main(["train", "bpe.json", "--data", "bpe"]) == 0
    capsys.readouterr()
    assert main(["generate", "--checkpoint", "runs/bpe", "--prompt", "7 and 7", "--tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("7 and 7")
