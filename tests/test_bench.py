"""The benchmarks: a wrong result is caught, an absent peer is named, results accumulate, a README block is made."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parashoot.bench import cases, contestants, results, run
from parashoot.bench.cases import SUITES, Case, Suite, problem
from parashoot.bench.contestants import on_the_cell
from parashoot.bench.trial import Contestant, Entry, agreement
from parashoot.cli import main
from parashoot.scan import scan

CPU = torch.device("cpu")
TINY = Case("gru", 2, 24, 8, "float32")


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Path:
    """A suite 'tiny' of two cases, in a directory of its own where the results go; copies are not measured."""
    monkeypatch.chdir(tmp_path)
    small = (TINY, dataclasses.replace(TINY, cell="lstm", mode="infer"))
    monkeypatch.setitem(SUITES, "tiny", Suite("two small cases", small, ("scan-torch", "loop", "hgrn")))
    monkeypatch.setitem(results.AXES, "tiny", results.AXES["time"])
    monkeypatch.setattr(run, "copy_bandwidth", lambda device: 1e10)
    return Path("bench.jsonl")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def entry_with(y=lambda y: y, grad=lambda g: g, case: Case = TINY) -> Entry:
    """`ps.scan` on a case, its result and the gradient by x changed."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):  # type: ignore[override]
            return v.clone()

        @staticmethod
        def backward(ctx, g):  # type: ignore[override]
            return grad(g)

    params = problem(case, CPU)[1]
    return on_the_cell(case, CPU, lambda x: y(scan(case.step, Changed.apply(x), params)[0]))


def test_rows_are_added_and_a_table_is_printed(tiny, capsys):
    assert main(["bench", "tiny", "--repeats", "3"]) == 0
    out = capsys.readouterr().out
    assert main(["bench", "tiny", "--repeats", "3", "--contestants", "loop", "--commit", "abc"]) == 0
    rows = rows_of(tiny)
    assert [r["contestant"] for r in rows] == ["scan-torch", "loop", "hgrn", "scan-torch", "loop", "loop", "loop"]
    for row in rows:
        assert row["commit"]
        assert row["device"]
        assert row["versions"]["torch"] == torch.__version__
        if row["contestant"] != "hgrn":
            assert row["status"] == "ok"
            assert row["error"] < 1e-6
            assert row["compared_steps"] == 24
            assert row["forward_us"] == sorted(row["forward_us"])
            assert ("backward_us" in row) == (row["mode"] == "train") == (row["gradient_error"] is not None)
    assert rows[-1]["commit"] == "abc"
    assert "gru fp32 2 x 24 x 8" in out
    assert "x floor" in out
    assert "5 rows added to bench.jsonl" in out


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "ok"),
        ({"y": lambda y: y * 1.001}, "wrong"),
        ({"grad": lambda g: g * 1.001}, "wrong"),
    ],
    ids=["right", "off", "gradient off"],
)
def test_what_disagrees_with_the_loop_is_wrong(changes, status):
    assert agreement(entry_with(**changes), train=True)["status"] == status


def test_a_result_that_is_not_finite_is_infinitely_wrong():
    found = agreement(entry_with(lambda y: torch.where(y > 0.5, torch.nan, y)), train=False)
    assert (found["status"], found["error"]) == ("wrong", float("inf"))
    found = agreement(entry_with(grad=lambda g: g * torch.nan), train=True)
    assert (found["status"], found["gradient_error"]) == ("wrong", float("inf"))


def test_only_a_part_is_compared_and_exactly():
    case = Case("slstm", 3, 40, 96, "float64")
    found = agreement(entry_with(case=case), train=True)
    assert found["status"] == "ok"
    assert found["error"] < 1e-10
    beyond = agreement(entry_with(lambda y: torch.cat([y[..., :64], y[..., 64:] + 1], -1), case=case), train=True)
    assert beyond == found


@pytest.mark.parametrize("cell", ["headgru", "elman"])
def test_cells_whose_channels_mix_are_compared_too(cell):
    assert agreement(entry_with(case=Case(cell, 3, 20, 72, "float64")), train=True)["status"] == "ok"


def test_floors_are_the_bytes_that_must_move_once():
    case = Case("lstm", 2, 10, 8, "bfloat16")
    found, _ = run.measure(case, [run.CONTESTANTS["scan-torch"]], CPU, 1e6, 3, float("inf"))
    assert found[0]["floor_us"] == [2 * (10 * 3 * 8 + 10 * 8) * 2, 2 * (2 * 10 * 3 * 8 + 2 * 10 * 8) * 2]


def test_an_absent_peer_is_skipped_by_name(tiny, capsys, monkeypatch):
    def missing(name: str):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    monkeypatch.setitem(SUITES, "tiny", Suite("", (TINY,), cases.PEERS))
    assert main(["bench", "tiny", "--repeats", "3"]) == 0
    reasons = {row["contestant"]: row["reason"] for row in rows_of(tiny)}
    packages = {"pararnn-torch": "pararnn-torch", "hgrn": "fla-core", "gated-delta": "fla-core"}
    for name, package in {**packages, "accelerated-scan": "accelerated-scan"}.items():
        assert reasons[name].startswith("No module named ")
        assert reasons[name].endswith(f": pip install {package}")
    assert "needs a GPU" in reasons["cudnn-gru"]
    assert "flashrnn" not in reasons  # it has no GRU
    assert "pip install fla-core" in capsys.readouterr().out


def test_whatever_a_contestant_raises_leaves_the_others_running(capsys):
    def fails(case, device):
        raise ZeroDivisionError("one over\nnothing")

    def late(case, device):
        calls = itertools.count()
        return entry_with(lambda y: y if next(calls) < 20 else y / torch.empty(0))

    makers = {"fails": fails, "late": late, "fine": lambda case, device: entry_with()}
    found, _ = run.measure(TINY, [Contestant(name, make) for name, make in makers.items()], CPU, 1e10, 30, float("inf"))
    assert [row["status"] for row in found] == ["skipped", "skipped", "ok"]
    assert found[0]["reason"] == "ZeroDivisionError: one over"
    assert "fails: skipped, ZeroDivisionError: one over\n" in capsys.readouterr().out


def test_the_backward_pass_is_both_less_forward():
    times = {"forward": itertools.cycle([3.0, 4.0, 5.0]), "both": itertools.cycle([10.0, 11.0, 12.0])}
    clocks = {name: times[name].__next__ for name in times}
    lane = run.Lane({}, clocks, {name: [] for name in clocks})
    for _ in range(3):
        lane.sample()
    row = lane.finished()
    assert row["forward_us"] == [3.4e6, 4e6, 4.6e6]
    assert row["backward_us"] == [6.4e6, 7e6, 7.6e6]


def test_interrupting_keeps_what_was_measured(tiny, capsys, monkeypatch):
    sample, count = run.Lane.sample, itertools.count()

    def interrupted(self):
        if next(count) == 16:  # in the second case, once every contestant there has been asked twice
            raise KeyboardInterrupt
        sample(self)

    monkeypatch.setattr(run.Lane, "sample", interrupted)
    assert main(["bench", "tiny", "--repeats", "4"]) == 130
    rows = [row for row in rows_of(tiny) if row["status"] != "skipped"]
    assert [(row["cell"], row["samples"]) for row in rows] == [("gru", 4), ("gru", 4), ("lstm", 2), ("lstm", 2)]
    assert "rows added" in capsys.readouterr().out


def test_the_time_budget_ends_between_rows(tiny, capsys):
    assert main(["bench", "tiny", "--minutes", "1e-9"]) == 0
    assert "Stopped: 2 of 2 cases not run." in capsys.readouterr().out
    assert not tiny.exists()


def test_render_replaces_only_its_block(tiny, monkeypatch):
    assert main(["bench", "tiny", "--repeats", "3"]) == 0
    rows = rows_of(tiny)
    wrong = {**rows[1], "contestant": "fast and wrong", "status": "wrong", "forward_us": [1.0, 1.0, 1.0]}
    ours = {**rows[0], "contestant": "scan-triton"}
    newer = {**rows[1], "forward_us": [1e6, 2e6, 3e6], "backward_us": [1e6, 2e6, 3e6]}
    tiny.write_text("".join(json.dumps(row) + "\n" for row in [*rows, wrong, ours, newer]))
    readme = Path("README.md")
    readme.write_text(f"before\n{results.START}\nold\n{results.END}\nafter\n")
    axis = results.AXES.pop("tiny")
    assert main(["bench", "--render", "bench.jsonl"]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{results.START}\n**tiny**: two small cases. ")
    assert text.endswith(f"{results.END}\nafter\n")
    assert "old" not in text
    lines = {line.split("|")[2].strip(): " ".join(line.split()) for line in text.splitlines() if line.startswith("|")}
    total = ours["forward_us"][1] + ours["backward_us"][1]
    first = next(line for line in (" ".join(v.split()) for v in text.splitlines()) if "| loop | 2 s |" in line)
    assert first.endswith(f"| {4e6 / total:.2f}x |")
    assert lines["fast and wrong"].endswith("wrong | |")
    assert "Not run: hgrn: No module named" in text
    assert main(["bench", "--render", "bench.jsonl"]) == 0
    assert readme.read_text() == text
    monkeypatch.setitem(results.AXES, "tiny", axis)  # drawn, not tabulated
    assert main(["bench", "--render", "bench.jsonl"]) == 0
    text = readme.read_text()
    assert (
        "![two small cases](bench-tiny.png)" in text
        and "**tiny**: two small cases. " in text
        and "| loop |" not in text
    )
    assert Path("bench-tiny.png").read_bytes().startswith(b"\x89PNG")


def test_cases_by_a_part_of_their_names(tiny, capsys):
    every = [str(case) for case in SUITES["tiny"].cases]
    assert main(["bench", "tiny", "--repeats", "3", "--contestants", "loop", "--cases", every[1]]) == 0
    assert [row["case"] for row in rows_of(tiny)] == [name for name in every if every[1] in name]
    assert "[1/1, " in capsys.readouterr().out


def test_wrong_uses_are_one_line(tiny, capsys):
    def fails(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["bench", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "quick, table, peers" in fails("quack")
    assert "scan-triton" in fails("tiny", "--contestants", "scan-triton,lop")
    assert "gru fp32 2 x 24 x 8" in fails("tiny", "--cases", "gruu")
    assert "--repeats" in fails("tiny", "--repeats", "1")
    assert "--minutes" in fails("tiny", "--minutes", "0")
    assert "--device" in fails("tiny", "--device", "abacus")
    assert "existing results file" in fails("--render", "none.jsonl")
    tiny.write_text("{}\n")
    assert "line 1" in fails("--render", "bench.jsonl")
    tiny.write_text("")
    assert results.START in fails("--render", "bench.jsonl")


@pytest.mark.parametrize("name", SUITES)
def test_suites_ask_contestants_that_exist_and_fit(name):
    suite = SUITES[name]
    assert set(suite.contestants) <= set(run.CONTESTANTS)
    assert len(set(suite.cases)) == len(suite.cases)
    for case in suite.cases:
        name, _, width = case.cell.partition("/")
        assert case.step.name == name and (not width or case.step.width == int(width))
        assert sum(run.CONTESTANTS[c].fits(case) for c in suite.contestants) >= 2
    assert {c for c in suite.contestants if any(run.CONTESTANTS[c].fits(case) for case in suite.cases)} == {
        *suite.contestants
    }


def test_heads_of_flashrnn_are_lstms():
    x, w, b = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 9, 4, 1, 5), (4, 1, 5, 5), (4, 1, 5)))
    h = c = torch.zeros(2, 1, 5, dtype=torch.float64)
    for t, got in enumerate(contestants.head_lstm(x, w, b).unbind(1)):
        i, f, z, o = (x[:, t] + b + torch.einsum("ghdp,bhp->bghd", w, h)).unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        h = torch.sigmoid(o) * torch.tanh(c)
        torch.testing.assert_close(got, h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("checked", [True, False])
def test_pararnn_runs_on_the_same_gates(cell, checked):
    pytest.importorskip("pararnn")
    assert (
        agreement(contestants.pararnn(checked, dataclasses.replace(TINY, cell=cell), CPU), train=True)["status"] == "ok"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cuda_graphs_and_what_cannot_be_captured():
    def waits(case, device):
        params = problem(case, device)[1]
        return on_the_cell(case, device, lambda x: scan(case.step, x, params)[0] * float(x.detach().sum() > -1e9))

    asked = [run.CONTESTANTS["loop-graph"], run.CONTESTANTS["loop"], Contestant("waits", waits)]
    found, _ = run.measure(Case("gru", 2, 64, 32), asked, torch.device("cuda"), 3e12, 5, float("inf"))
    graphed, launched, waiting = found
    assert [row["status"] for row in found] == ["ok", "ok", "ok"]
    assert graphed["timed_by"] == "graph"
    assert launched["timed_by"] == "events"
    assert waiting["timed_by"].startswith("events, no graph: ")
    assert 0 < graphed["forward_us"][1] < launched["forward_us"][1]
    assert graphed["peak_bytes"] > 0
