"""The command line: exit codes, one-line errors, and a run interrupted and continued in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from parashoot import cells, diagnostics
from parashoot.cli import main
from parashoot.lm import checkpoint
from parashoot.lm.data import Data, Tokens
from parashoot.lm.presets import find_training
from parashoot.scan import scan

SRC = Path(__file__).parents[1] / "src"
MODEL = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 32}


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> str:
    """A training of a second or two, as a JSON file in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("parashoot.lm.report.SPEED_LENGTH", 64)
    text = "".join(f"{a} times {b} is {a * b}. " for a in range(25) for b in range(25)).encode()
    parts = {"train": text[:6000], "validation": text[6000:]}
    splits = {k: Tokens(k, [np.frombuffer(v, np.uint8)], np.zeros(1, np.uint64), len(v)) for k, v in parts.items()}
    monkeypatch.setattr("parashoot.lm.data.corpus", lambda: Data(256, None, splits, "of this test"))
    facts = {"model": MODEL, "steps": 3, "batch_size": 2, "sequence_length": 24, "learning_rate": 1e-3}
    Path("tiny.json").write_text(json.dumps(facts))
    return "tiny.json"


def fails(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"parashoot {arguments[0]}: ")
    return error


def test_help_and_wrong_usage(capsys):
    assert main(["--help"]) == 0
    assert "explain" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["fly"]) == 2


def test_train_then_generate(recipe, capsys):
    assert main(["train", recipe]) == 0
    out = capsys.readouterr().out
    where = Path("runs/tiny")
    for words in (
        "bits per byte",
        "Sample:",
        "ps.Sequential()",
        "autograd through the loop",
        "parashoot generate --checkpoint",
    ):
        assert words in out
    assert {p.name for p in where.iterdir()} >= {"step-000003", "latest", "log.jsonl", "report.json"}
    facts = json.loads((where / "report.json").read_text())
    assert facts["steps"] == 3
    assert facts["speed_ms"]["error"] < 1e-5
    command = [
        "generate",
        "--checkpoint",
        str(where),
        "--prompt",
        "2 times",
        "--tokens",
        "9",
        "--seed",
        "4",
    ]
    texts = []
    for _ in range(2):
        assert main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("2 times")


def test_a_run_is_not_replaced_unasked(recipe, capsys):
    assert main(["train", recipe, "--steps", "1"]) == 0
    capsys.readouterr()
    error = fails(capsys, "train", recipe)
    assert "--resume runs/tiny" in error
    assert "--overwrite" in error
    assert main(["train", recipe, "--steps", "2", "--overwrite"]) == 0
    assert [p.name for p in checkpoint.steps(Path("runs/tiny"))] == ["step-000002"]


def test_sigint_saves_and_says_how_to_continue(recipe, capsys):
    arguments = [sys.executable, "-m", "parashoot", "train", recipe, "--steps", "100000", "--out", "a run"]
    environment = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = Path("a run/log.jsonl"), time.monotonic() + 50
    while not (log.exists() and log.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert f"parashoot train {recipe} --steps 100000 --resume 'a run'" in out
    saved = checkpoint.facts(checkpoint.find("a run"))
    assert saved["step"] == len(log.read_text().splitlines())


def test_training_errors_are_one_line(recipe, capsys, tmp_path):
    assert "demo" in fails(capsys, "train", "demmo")
    assert "directory with an index.json" in fails(capsys, "train", recipe, "--data", "none")
    assert "directory of a run" in fails(capsys, "train", recipe, "--resume", "none")
    assert "'abacus'" in fails(capsys, "train", recipe, "--device", "abacus")
    assert "steps: got" in fails(capsys, "train", recipe, "--steps", "0")
    Path("short.txt").write_text("short")
    assert main(["data", "short", "--text", "short.txt"]) == 0
    capsys.readouterr()
    assert "5 tokens" in fails(capsys, "train", recipe, "--data", "short")
    Path("broken.json").write_text("{")
    assert "not JSON" in fails(capsys, "train", "broken.json")
    Path("extra.json").write_text(json.dumps({"model": MODEL, "stepz": 3}))
    assert "'stepz'" in fails(capsys, "train", "extra.json")
    Path("preset.json").write_text(json.dumps({"model": "8B"}))
    assert "400M" in fails(capsys, "train", "preset.json")


def test_resume_continues_the_run_that_it_names(recipe, capsys):
    assert main(["train", recipe, "--steps", "2", "--out", "run"]) == 0
    assert main(["train", recipe, "--steps", "2", "--resume", "run"]) == 0
    assert "Trained 2 steps" in capsys.readouterr().out
    assert "steps = 3 (saved: 2)" in fails(capsys, "train", recipe, "--resume", "run")
    assert "model = " in fails(capsys, "train", "demo", "--resume", "run")
    assert "--overwrite" in fails(capsys, "train", recipe, "--resume", "run", "--overwrite")


def test_eval_prints_the_figures_of_a_split(recipe, capsys):
    assert main(["train", recipe]) == 0
    expected = json.loads(Path("runs/tiny/report.json").read_text())
    capsys.readouterr()
    assert main(["eval", "runs/tiny", "--split", "validation", "--streams", "32", "--lengths", "100"]) == 0
    out = capsys.readouterr().out
    assert f"bits per byte  {expected['validation_bits_per_byte']:.4f}" in out
    assert f"perplexity     {expected['validation_perplexity']:.4f}" in out
    assert "64-127" in out
    assert "128-" not in out
    assert "one of train, validation" in fails(capsys, "eval", "runs/tiny")
    assert "--window" in fails(capsys, "eval", "runs/tiny", "--window", "0")
    assert "directory of a run" in fails(capsys, "eval", "none")
    Path("wide.json").write_text(Path("tiny.json").read_text().replace("256", "255"))
    assert "at least 256" in fails(capsys, "train", "wide.json")


def test_generation_errors_are_one_line(capsys, tmp_path):
    assert "directory of a run" in fails(capsys, "generate", "--checkpoint", str(tmp_path / "none"))


def test_explain(capsys):
    assert main(["explain", "gru", "--time", "2048", "--channels", "32"]) == 0
    assert "channelwise" in capsys.readouterr().out
    assert all(name in fails(capsys, "explain", "gruu") for name in cells.__all__)
    assert "multiple of the head width 8" in fails(capsys, "explain", "headgru", "--channels", "12")
    assert "--time" in fails(capsys, "explain", "gru", "--time", "0")


def test_cells_of_the_user(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mycells_of_a_test.py").write_text(
        "import torch\nimport parashoot as ps\n\n\n"
        "@ps.cell\ndef leaky(h: ps.State, x: ps.Input, a: ps.Param):\n    return torch.tanh(a * h + x)\n\n\nscale = 3.0\n"
    )
    assert main(["explain", "mycells_of_a_test.py:leaky"]) == 0
    assert main(["explain", "mycells_of_a_test:leaky"]) == 0
    assert capsys.readouterr().out.count("cell leaky: channelwise") == 2
    assert "Its cells: leaky" in fails(capsys, "explain", "mycells_of_a_test.py:leeky")
    assert "@ps.cell" in fails(capsys, "explain", "mycells_of_a_test.py:scale")
    assert "existing Python file" in fails(capsys, "explain", "nowhere.py:leaky")


def test_verify_reports_and_fails_by_exit_code(capsys, monkeypatch):
    shape = ("--time", "48", "--channels", "8", "--batch", "1")
    assert main(["verify", "gru", *shape]) == 0
    assert "passed" in capsys.readouterr().out
    assert main(["verify", *shape]) == 0
    assert capsys.readouterr().out.count("passed") == len(cells.__all__)
    monkeypatch.setattr(diagnostics, "scan", off_by_one_percent)
    assert main(["verify", "gru", *shape, "--dtype", "float64"]) == 1
    assert "False" in capsys.readouterr().out


def off_by_one_percent(*arguments, **options):
    y, *rest = scan(*arguments, **options)
    return 1.01 * y, *rest


def test_names_that_are_no_modules_are_one_line(capsys, tmp_path):
    for name in (":", ".:x", "no.such:cell"):
        assert "importable module" in fails(capsys, "verify", name)
    (tmp_path / "broken.py").write_text("def step(:\n")
    assert "line 1" in fails(capsys, "verify", f"{tmp_path / 'broken.py'}:step")
    (tmp_path / "rows.jsonl").write_text("[1]\n")
    assert "line 1" in fails(capsys, "bench", "--render", str(tmp_path / "rows.jsonl"))
    assert "--samples" in fails(capsys, "tasks", "show", "parity", "--samples", "0")


def test_a_terminal_without_a_character_still_gets_the_rest(recipe):
    """Bytes that are no UTF-8 are shown as U+FFFD, which Latin-1 has not."""
    options = {"env": {**os.environ, "PYTHONPATH": str(SRC), "PYTHONIOENCODING": "latin-1"}, "capture_output": True}
    assert main(["train", recipe, "--out", "runs/sp ace"]) == 0
    command = ["generate", "--checkpoint", "runs/sp ace", "--prompt", "\u4e16", "--tokens", "9"]
    done = subprocess.run([sys.executable, "-m", "parashoot", *command], check=False, **options)
    assert (done.returncode, done.stderr.decode("latin-1")) == (0, "")
    assert done.stdout.startswith(b"\\u4e16")


def test_commands_to_copy_are_quoted(recipe, capsys):
    assert main(["train", recipe, "--out", "runs/sp ace"]) == 0
    assert "--checkpoint 'runs/sp ace' --prompt 'The state" in capsys.readouterr().out
    assert "--resume 'runs/sp ace'" in fails(capsys, "train", recipe, "--out", "runs/sp ace")
    assert (
        main(["generate", "--checkpoint", "runs/sp ace", "--prompt", "\udcff", "--tokens", "2"]) == 0
    )  # a byte that is no UTF-8
    again = ["generate", "--checkpoint", "runs/sp ace", "--seed", str(2**70)]
    assert "seed: got 1180591620717411303424; expected an integer from -2^63" in fails(capsys, *again)


def test_a_configuration_may_begin_with_a_byte_order_mark(recipe):
    Path("marked.json").write_bytes(b"\xef\xbb\xbf" + Path(recipe).read_bytes())
    assert find_training("marked.json")[1] == find_training(recipe)[1]
