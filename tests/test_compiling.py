"""When kernels are compiled: what is compiled ahead is what will run; errors are seen where they belong."""

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import parashoot as ps
from oracle import random_problem, random_resets
from parashoot import plan
from parashoot.op import as_seen
from parashoot.tiling import Tiling

pytest.importorskip("triton")
from parashoot.triton import compiling, runtime

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
KERNEL = ps.MultipleShooting(backend="triton")


def signature(jobs: list[compiling.Job]) -> list[tuple]:
    """What Triton compiles by: kernels, dtypes of tensors, types of numbers and values of integers."""
    seen = lambda v: v.dtype if isinstance(v, Tensor) else (type(v), None if isinstance(v, float) else v)
    return [(id(kernel), grid, {k: seen(v) for k, v in arguments.items()}) for kernel, grid, arguments in jobs]


@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "reverse"])
@pytest.mark.parametrize("all_states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("name", ["mingru", "gru", "lstm", "headgru"])
def test_what_is_compiled_ahead_is_what_backward_runs(name, all_states, reverse, reset, chunks, tiling, monkeypatch):
    tiling(Tiling(16 if name == "headgru" else 8, 1, 2, 2, chunks, 4, 8, 8, roomy=chunks > 1))
    cell, expected, started = getattr(ps.cells, name), [], []

    def record(jobs, x, follow=None):  # and run nothing
        started.append(jobs)
        if follow is not None:
            expected.append(follow())

    monkeypatch.setattr(runtime, "_start", record)
    x, params, h0 = random_problem(cell, 2, 40, 16, dtype=torch.float32)
    given = [v.to(DEVICE).requires_grad_() for v in (x, h0, *params)]
    cut = random_resets(2, 40, share=0.1).to(DEVICE) if reset else None
    options = {"reset": cut, "reverse": reverse, "return_states": all_states, "solver": KERNEL}
    y, _ = ps.scan(cell, given[0], tuple(given[2:]) or None, given[1], **options)
    y.backward(torch.randn_like(y))
    assert len(started) == 2 and len(expected) == 1
    assert signature(expected[0]) == signature(started[1])
    limited = [job[2].get("maxnreg") for jobs in started for job in jobs[:1]]
    assert limited == [255 if chunks > 1 and cell.width is None else None] * 2


def test_each_pass_is_cut_as_the_plan_says(monkeypatch):
    started, cut = [], {False: Tiling(8, 1, 4, 2, 3, 4), True: Tiling(16, 1, 4, 2, 5, 4)}
    monkeypatch.setattr(runtime, "_start", lambda jobs, x, follow=None: started.extend([jobs, follow and follow()]))
    monkeypatch.setattr(plan, "choose", lambda *given: (cut[given[8]], ("chosen by a test",)))
    plan.make_plan.cache_clear()
    x, params, _ = random_problem(ps.cells.gru, 2, 60, 16, dtype=torch.float32)
    given = x.to(DEVICE).requires_grad_(), tuple(p.to(DEVICE) for p in params)
    y, _ = ps.scan(ps.cells.gru, *given, solver=KERNEL)
    y.backward(torch.randn_like(y))
    assert [(jobs[0][2]["chunks"], jobs[0][2]["BD"]) for jobs in started[:3]] == [(3, 8), (5, 16), (5, 16)]
    assert "; backward 5 chunks" in str(ps.explain(ps.cells.gru, *given, solver=KERNEL))
    plan.make_plan.cache_clear()


def test_the_gradient_of_a_sum_runs_what_is_compiled_ahead(monkeypatch):
    cell, started = ps.cells.gru, []
    monkeypatch.setattr(runtime, "_start", lambda jobs, x, follow=None: started.extend([jobs, follow and follow()]))
    x, params, _ = random_problem(cell, 2, 40, 16, dtype=torch.float32)
    y, _ = ps.scan(cell, x.to(DEVICE).requires_grad_(), tuple(p.to(DEVICE) for p in params), solver=KERNEL)
    y.sum().backward()  # its gradient is one number, seen B T C times
    assert signature(started[1]) == signature(started[2])


@pytest.mark.parametrize("name", ["gru", "lstm", "headgru"])
def test_candidates_are_compiled_as_they_run(name, tiling, monkeypatch):
    cell, compiled, started = getattr(ps.cells, name), [], []
    monkeypatch.setattr(runtime, "compile_now", lambda jobs, device: compiled.extend(jobs))
    monkeypatch.setattr(runtime, "_start", lambda jobs, x, follow=None: started.extend(jobs))
    x, params, _ = random_problem(cell, 2, 40, 16, dtype=torch.float32)
    given = x.to(DEVICE).requires_grad_(), [p.to(DEVICE) for p in params]
    tilings = [
        Tiling(16 if name == "headgru" else 8, warps, 2, 2, chunks, 4, 8, 8) for warps, chunks in ((1, 5), (2, 4))
    ]
    found, start = (
        plan.trace_for(cell, given[0], as_seen(cell, given[1], torch.float32)),
        x.new_empty(2, len(cell.states), 16),
    )
    runtime.compile_all(cell, found, [(t, t) for t in tilings], given[0], given[1], start, 1e-6)
    for t in tilings:
        tiling(t)
        ps.scan(cell, given[0], tuple(given[1]), solver=KERNEL)[0].backward(torch.ones(2, 40, 16, device=DEVICE))
    assert signature(compiled) == signature(started)


@pytest.fixture
def anywhere(monkeypatch):
    """Threads whatever the version of Python, no GPU asked, nothing compiled before."""
    monkeypatch.setattr(compiling, "THREADS", True)
    monkeypatch.setattr(compiling, "_compiled", set())
    monkeypatch.setattr(compiling, "_begun", {})
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def job(warmup) -> compiling.Job:
    return SimpleNamespace(warmup=lambda **given: warmup()), (1,), {"BD": 8}


def test_what_follows_is_begun_before_and_waited_for_when_its_turn_comes(anywhere):
    x, go, events = torch.zeros(1), threading.Event(), []
    slow = [job(lambda: (go.wait(10), events.append("slow")))]
    pair = [job(lambda: events.append("pair")), job(lambda: events.append("pair"))]
    compiling.compile_together(pair, x, lambda: slow)
    assert events == ["pair", "pair"]
    compiling.compile_together(pair, x, lambda: pytest.fail("it was begun already"))
    threading.Timer(0.05, go.set).start()
    compiling.compile_together(slow, x)
    assert events == ["pair", "pair", "slow"]


def test_what_differs_is_compiled_once(anywhere):
    events, kernels = [], [SimpleNamespace(warmup=lambda grid, **given: events.append(given)) for _ in range(2)]
    given = [{"BD": 8, "num_warps": n, "chunks": c, "dh_ptr": d} for n in (1, 2) for c in (3, 4) for d in (None, 0)]
    compiling.compile_now([(k, (1,), g) for k in kernels for g in given], torch.device("cpu"))
    assert len(events) == 8
    assert {tuple(g[k] for k in ("num_warps", "dh_ptr")) for g in events} == {(n, d) for n in (1, 2) for d in (None, 0)}


def test_what_fails_ahead_fails_again_where_it_is_needed(anywhere):
    def broken():
        raise ValueError("no such register")

    x, pair = torch.zeros(1), [job(broken), job(broken)]
    compiling.compile_together([job(lambda: None)], x, lambda: pair)
    with pytest.raises(ValueError, match="no such register"):
        compiling.compile_together(pair, x)


def test_triton_hashes_itself_while_a_cell_is_traced(monkeypatch):
    compiling.hashing.cache_clear()
    monkeypatch.setattr(compiling, "THREADS", False)  # as before Python 3.12
    assert compiling.hashing() is None
    compiling.hashing.cache_clear()
    monkeypatch.setattr(compiling, "THREADS", True)
    hashed = compiling.hashing()
    assert hashed is not None and hashed is compiling.hashing()
    assert hashed.result() == compiling.cache.triton_key()
    compiling.hashing.cache_clear()


def test_what_is_compiled_waits_for_the_hash(monkeypatch):
    order, done = [], compiling.Future()
    monkeypatch.setattr(done, "exception", lambda: order.append("hash"))
    monkeypatch.setattr(compiling, "hashing", lambda: done)
    monkeypatch.setattr(compiling, "THREADS", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(compiling, "_begin", lambda jobs, device: order.append("compile") or [])
    compiling.compile_together([(object(), (1,), {}), (object(), (1,), {})], torch.zeros(1))
    assert order == ["hash", "compile"]
