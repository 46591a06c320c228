"""The benchmark of a training step: rows, what it counts, memory that does not suffice, and where time goes."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from parashoot.errors import ArgumentError
from parashoot.lm import ParaRNNConfig
from parashoot.lm.presets import preset
from parashoot.lm.update import Training

SCRIPT = str(Path(__file__).parents[1] / "benchmarks" / "lm_step.py")


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(SCRIPT)


def rows(monkeypatch, out: Path, arguments: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *arguments.split(), "--device", "cpu", "--out", str(out)])
    monkeypatch.setattr("parashoot.bench.trial.copy_bandwidth", lambda device: 1e10)
    runpy.run_path(SCRIPT, run_name="__main__")
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows_say_what_was_measured(monkeypatch, tmp_path):
    found = rows(
        monkeypatch,
        tmp_path / "out",
        "--models demo demo:lstm,num_hidden_layers=1 --shapes 2x16 1x32 --steps 2 --profile",
    )
    assert [(r["model"], r["batch"], r["length"]) for r in found] == [
        (m, *shape) for m in ("demo", "demo:lstm,num_hidden_layers=1") for shape in ((2, 16), (1, 32))
    ]
    for r in found:
        assert r["parameters"] - r["without_embedding"] == 256 * 128
        assert r["tokens_per_s"] == pytest.approx(32 / r["ms"] * 1e3)
        assert r["mfu"] == pytest.approx(6 * r["without_embedding"] * 32 / (r["ms"] / 1e3) / 989e12)
        assert len(r["profile"]["kernels"]) == 40
        assert 0 < sum(k["share"] for k in r["profile"]["kernels"]) <= 1 - r["profile"]["idle"] + 1e-9


def test_too_little_memory_is_a_row(monkeypatch, tmp_path):
    update = Training.update

    def scarce(self, batch, rate):
        if batch[0][0].shape[1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nmore")
        return update(self, batch, rate)

    monkeypatch.setattr(Training, "update", scarce)
    found = rows(monkeypatch, tmp_path / "out", "--models demo --shapes 2x32 2x16 --steps 1")
    assert [r.get("failed") for r in found] == ["out of memory", None]
    assert found[0]["why"] == "CUDA out of memory. Tried to allocate 1 GiB."


def test_models_are_presets_with_changes(script):
    assert script["find_model"]("400M:cell=lstm,recurrent_clip=null") == preset(
        "400M", cell="lstm", recurrent_clip=None
    )
    assert script["find_model"]("demo:lstm") == preset("demo", cell="lstm")
    assert isinstance(script["find_model"]("7B"), ParaRNNConfig)
    with pytest.raises(ArgumentError):
        script["find_model"]("demo:no_such_thing")


def test_time_without_kernels_counts_overlaps_once(script):
    found = script["shares"](
        [("b", 10.0, 14.0), ("a", 0.0, 4.0), ("a", 2.0, 5.0), ("c", 11.0, 12.0), ("b", 19.0, 20.0)]
    )
    assert found["idle"] == pytest.approx(1 - 10 / 20)
    assert [(k["name"], k["calls"], k["ms"], k["share"]) for k in found["kernels"]] == [
        ("a", 2, 0.007, 0.35), ("b", 2, 0.005, 0.25), ("c", 1, 0.001, 0.05)
    ]  # fmt: skip


def test_no_two_runs_on_enwik8_share_a_configuration_or_a_log():
    enwik8 = runpy.run_path(str(Path(SCRIPT).parent / "enwik8.py"))
    jobs = enwik8["sweep"](400) + enwik8["sweep"](600)
    files = [(job.config, job.config.with_name(f"{job.config.stem}.txt")) for job in jobs]
    assert len({path for pair in files for path in pair}) == 2 * len(jobs)
    assert len({tuple(job.facts.items()) for job in jobs}) == len(jobs)


def test_a_report_on_enwik8_of_another_configuration_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    enwik8, ran = runpy.run_path(str(Path(SCRIPT).parent / "enwik8.py")), []

    def trained(gpu, log, what, config, *rest):
        ran.append((json.loads(Path(config).read_text())["learning_rate"], *rest))
        job.directory.mkdir(parents=True, exist_ok=True)
        facts = {"validation_bits_per_byte": 2.0, "minutes": 1.0, "tokens_per_s": 3.0}
        (job.directory / "report.json").write_text(json.dumps(facts))
        return ""

    job = enwik8["Job"]("paragru", 10, 0.004, "sweep")
    monkeypatch.setitem(type(job).run.__globals__, "_parashoot", trained)
    job.config.parent.mkdir(parents=True)
    for _ in range(2):
        assert job.run("")["learning_rate"] == 0.004
    assert len(ran) == 1  # the second time the report is there
    job.config.write_text(job.config.read_text().replace("0.004", "0.008"))  # as if another run had left it
    job.run("")
    assert [rate for rate, *_ in ran] == [0.004, 0.004] and ran[1][-1] == "--overwrite"
