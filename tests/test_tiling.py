"""How kernels cut problems: laws of every choice, the three regimes, what `ps.tune` keeps."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import parashoot as ps
from parashoot import plan, tiling
from parashoot.tiling import MOST_ROWS, Tiling, choose, choose_heads
from parashoot.trace import trace_of
from parashoot.tune import _candidates, _fastest

H100 = 132  # multiprocessors
sizes = st.integers(1, 5000)


@given(
    st.integers(1, 64), sizes, sizes, st.sampled_from([2, 4]), st.integers(1, 4), st.tuples(st.integers(1, 500), st.integers(1, 900)),
    st.none() | st.integers(16, 600), st.booleans(), st.integers(0, 128),
)  # fmt: skip
def test_every_choice_covers_the_sequence(batch, time, channels, itemsize, slots, instructions, asked, backward, lead):
    found, reasons = choose(batch, time, channels, itemsize, slots, instructions, H100, asked, backward, lead)
    each, chunks = found.cut(time)
    assert each * (chunks - 1) < time <= each * chunks
    assert each % (found.unroll * found.pieces) == 0
    assert found.columns & (found.columns - 1) == 0 and found.columns % found.narrow == 0
    assert found.burn >= lead and found.burn % found.unroll == 0
    assert reasons


@ps.cell
def leaky(h: ps.State, x: ps.Input, p: ps.Param):
    return 0.9 * torch.tanh(h + p) + x


@ps.cell
def integrator(h: ps.State, x: ps.Input):
    return h + 1 / x


@pytest.mark.parametrize(("cell", "left"), [(leaky, 0.9), (integrator, 1.0), (ps.cells.lstm, 0.5)], ids=str)
def test_a_lead_lasts_until_a_state_at_rest_is_forgotten(cell, left):
    memory = trace_of(cell, torch.float32, torch.device("cpu")).memory
    assert memory == pytest.approx(left)
    steps = tiling.lead_for(memory, 1e-5)
    if left < 1:  # as few as will do, but for some
        assert left**steps < 1e-5 < left ** (steps - 10)
    else:
        assert steps == 0
    assert tiling.lead_for(0.99, 1e-5) == 0  # longer than any lead


def test_both_passes_have_tilings_of_their_own():
    step, adjoint = (choose(8, 2048, 2048, 2, 1, (165, 282), H100, None, backward)[0] for backward in (False, True))
    assert (step.columns, step.warps, step.chunks) == (128, 1, 8)
    assert (adjoint.columns, adjoint.warps, adjoint.chunks) == (64, 1, 4)


@given(
    st.integers(1, 64), sizes, st.integers(1, 300), st.sampled_from([2, 4]), st.integers(1, 4), st.integers(2, 32),
    st.none() | st.integers(16, 600),
)  # fmt: skip
def test_every_choice_for_heads_covers_the_sequence(batch, time, heads, itemsize, slots, width, asked):
    found, reasons = choose_heads(batch, time, heads * width, itemsize, slots, width, H100, asked)
    each, chunks = found.cut(time)
    assert each * (chunks - 1) < time <= each * chunks <= each * MOST_ROWS
    assert each % found.unroll == 0 and found.burn % found.unroll == 0
    assert width <= found.columns <= max(16, 2 * width - 1) and reasons


@pytest.mark.parametrize(("turns", "asked", "chunks"), [(False, None, 16), (True, None, 1), (True, 128, 16)])
def test_what_turns_is_cut_only_if_asked(turns, asked, chunks):
    found, reasons = choose_heads(8, 2048, 2048, 2, 1, 8, H100, asked, turns)
    assert found.cut(2048)[1] == chunks
    assert ("forget nothing" in reasons[0]) == (turns and asked is None)


@ps.cell(structure="headwise", width=8)
def normed(h: ps.State, x: ps.Input, R: ps.Param):
    h = torch.tanh(torch.einsum("hij,...hj->...hi", R, h) + x)
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)


@ps.cell(structure="headwise", width=8)
def mirrored(h: ps.State, k: ps.Input):
    return h - k * (2 * (k * h).sum(-1, keepdim=True) / ((k * k).sum(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    ("cell", "turns"),
    [(normed, False), (mirrored, True), (ps.cells.headrotor, True), (ps.cells.headgru, False)],
    ids=str,
)
def test_a_state_turns_if_its_length_matters_and_it_does_not_forget(cell, turns):
    assert trace_of(cell, torch.float32, torch.device("cpu")).turns == turns


@pytest.mark.parametrize(
    ("shape", "chunks", "reason"),
    [
        ((16, 2048, 4096), 1, "fill the device"),
        ((8, 2048, 2048), 4, "carries at once"),
        ((1, 1048576, 256), 256, "carries at once"),
        ((1, 64, 256), 1, "cutting them"),
    ],
    ids=["full", "usual", "long", "short"],
)
def test_regimes(shape, chunks, reason):
    batch, time, channels = shape
    found, reasons = choose(batch, time, channels, 2, 1, (18, 39), H100, None)
    assert found.cut(time)[1] == chunks
    assert reason in reasons[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiling._tuned.cache_clear()
    yield tmp_path / "parashoot"
    tiling._tuned.cache_clear()
    plan.make_plan.cache_clear()


def test_what_was_tuned_is_found_again(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    device, chosen = torch.device("cuda"), (Tiling(64, 1, 4, 4, 8), Tiling(128, 2, 4, 4, 4))
    tiling.remember(device, "one", chosen)
    tiling.remember(device, "two", chosen)
    tiling._tuned.cache_clear()
    assert tiling.tuned(device) == {"one": chosen, "two": chosen}
    other = {"one": {"no such field": 1}, "two": {"columns": 64}, "three": 3}  # of other versions
    (folder / "tilings.json").write_text(json.dumps({"a device": other}))
    tiling._tuned.cache_clear()
    assert tiling.tuned(device) == {}
    tiling.remember(device, "two", chosen)
    tiling._tuned.cache_clear()
    assert tiling.tuned(device) == {"two": chosen}


def test_each_pass_keeps_its_own_fastest_of_what_was_tried():
    start = Tiling(128, 1, 4, 4, 8, 16, roomy=True), Tiling(64, 1, 4, 3, 4, 16)
    pairs = _candidates(start, 2048, 2048, False)
    assert pairs[0] == start and len(set(pairs)) == len(pairs) > 15
    assert all([t.stages for t in pair] == [4, 3] and pair[0].narrow <= pair[0].columns for pair in pairs)
    assert sum([t.roomy for t in pair] == [True, False] for pair in pairs) == len(pairs) - 1
    seconds = dict.fromkeys(pairs, (2.0, 2.0)) | {pairs[3]: (1.0, 3.0), pairs[5]: (3.0, 1.0)}
    assert _fastest(seconds) == (pairs[3][0], pairs[5][1])


def test_tuning_needs_a_device_that_runs_kernels():
    with pytest.raises(ps.BackendError, match="no kernel runs here"):
        ps.tune(ps.cells.gru, torch.randn(1, 8, 3, 4))
    with pytest.raises(ps.ArgumentError, match="repeats"):
        ps.tune(ps.cells.gru, torch.randn(1, 8, 3, 4), repeats=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_plan_uses_what_tuning_found(folder):
    x = torch.randn(2, 1024, 3, 64, device="cuda", dtype=torch.bfloat16)
    ranked = ps.tune(ps.cells.gru, x, repeats=3)
    assert len(ranked) > 1 and list(ranked.values()) == sorted(ranked.values())
    assert "ps.tune measured" in str(ps.explain(ps.cells.gru, x))
    tiling._tuned.cache_clear()
    plan.make_plan.cache_clear()
    found = ps.explain(ps.cells.gru, x).plan
    assert found.tiling in {forward for forward, _ in ranked} and found.backward in {back for _, back in ranked}
    layer = ps.ParaGRU(256, 256, num_heads=2, device="cuda")
    assert ps.tune(*layer.prepared(torch.randn(1, 512, 256, device="cuda")), repeats=1)
