"""Laws of a scan, for any cell: splitting, resets, reversal, permutation, strides, chunk length, determinism."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import parashoot as ps
from oracle import CELLS, ONE_OF_EACH, loop, loop_reversed, random_problem, random_resets

CLOSE = {"rtol": 0, "atol": 1e-9}
cells = st.sampled_from(list(CELLS))
times = st.sampled_from([1, 2, 63, 64, 65]) | st.integers(1, 90)
seeds = st.integers(0, 10**6)
chunks = st.sampled_from([None, ps.Sequential(), ps.Newton()]) | st.integers(1, 100).map(ps.MultipleShooting)


def scan(cell, x, params, h0, **options):
    return ps.scan(cell, x, tuple(params) or None, h0, **options)


def assert_close(got, want):
    torch.testing.assert_close(got, want, **CLOSE)


@given(cells, times, st.integers(1, 90), chunks, seeds)
def test_a_scan_goes_on_from_its_last_state(name, first, second, solver, seed):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, first + second, 8, seed=seed)
    whole, end = scan(cell, x, params, h0, solver=solver, return_states=True)
    one, middle = scan(cell, x[:, :first], params, h0, solver=solver, return_states=True)
    two, last = scan(cell, x[:, first:], params, middle, solver=solver, return_states=True)
    assert_close(torch.cat([one, two], 1), whole)
    assert_close(last, end)
    assert_close(whole, loop(cell, x, params, h0))


@given(cells, st.lists(st.integers(1, 40), min_size=1, max_size=4), chunks, seeds)
def test_resets_are_separate_runs(name, parts, solver, seed):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, sum(parts), 8, seed=seed)
    reset = torch.zeros(2, sum(parts), dtype=torch.bool)
    runs, begin = [], 0
    for length in parts:
        start = h0 if begin == 0 else torch.zeros_like(h0)
        reset[:, begin] = begin > 0
        runs.append(scan(cell, x[:, begin : begin + length], params, start, solver=solver, return_states=True)[0])
        begin += length
    states, h_n = scan(cell, x, params, h0, reset=reset, solver=solver, return_states=True)
    assert_close(states, torch.cat(runs, 1))
    assert_close(h_n, runs[-1][:, -1])


@given(cells, times, chunks, st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.booleans(), seeds)
def test_resets_and_direction_are_the_loops(name, time, solver, share, reverse, seed):
    """Different resets for each sequence, at t = 0 and T - 1 too; in reverse they cut the same boundaries."""
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 3, time, 8, seed=seed)
    reset = random_resets(3, time, seed, share)
    states, h_n = scan(cell, x, params, h0, reset=reset, reverse=reverse, solver=solver, return_states=True)
    want = (loop_reversed if reverse else loop)(cell, x, params, h0, reset)
    assert_close(states, want)
    assert_close(h_n, want[:, 0 if reverse else -1])


@given(cells, times, chunks, seeds)
def test_reverse_is_a_flip_there_and_back(name, time, solver, seed):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, time, 8, seed=seed)
    y, h_n = scan(cell, x, params, h0, reverse=True, solver=solver)
    flipped, end = scan(cell, x.flip(1), params, h0, solver=solver)
    assert_close(y, flipped.flip(1))
    assert_close(h_n, end)


@given(cells, times, chunks, st.permutations(range(4)), seeds)
def test_sequences_do_not_see_each_other(name, time, solver, order, seed):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 4, time, 8, seed=seed)
    reset = random_resets(4, time, seed)
    y, h_n = scan(cell, x, params, h0, reset=reset, solver=solver)
    moved, end = scan(cell, x[order], params, h0[order], reset=reset[order], solver=solver)
    assert_close(moved, y[order])
    assert_close(end, h_n[order])


@given(cells, times, chunks, chunks, seeds)
def test_the_solver_does_not_matter(name, time, one, other, seed):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, time, 8, seed=seed)
    first, second = (scan(cell, x, params, h0, solver=s, return_states=True) for s in (one, other))
    assert_close(first[0], second[0])
    assert_close(first[1], second[1])


@given(cells, times, chunks, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), seeds)
def test_two_runs_give_the_same_bits(name, time, solver, dtype, seed):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, time, 8, dtype=dtype, seed=seed)
    x.requires_grad_()
    params = [p.requires_grad_() for p in params]
    results = []
    for _ in range(2):
        y, h_n = scan(cell, x, params, h0, solver=solver)
        results.append([y, h_n, *torch.autograd.grad(y.float().square().sum() + h_n.float().sum(), [x, *params])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


STRIDES = {
    "gates first in memory": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first in memory": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    "every other step": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every other channel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "part of a wider tensor": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "one sequence expanded": lambda x: x[:1].expand(x.shape),
    "one step expanded": lambda x: x[:, :1].expand(x.shape),
    "one channel expanded": lambda x: x[..., :1].expand(x.shape),
    "head-major": lambda x: x.unflatten(3, (2, 4)).transpose(2, 3).contiguous().transpose(2, 3).flatten(3),
}


@pytest.mark.parametrize("layout", STRIDES)
@pytest.mark.parametrize("structure", ONE_OF_EACH)
@pytest.mark.parametrize("solver", [None, ps.Newton(), ps.MultipleShooting(9)], ids=["auto", "newton", "9"])
def test_strides_are_honoured(layout, structure, solver):
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 3, 40, 8)
    x = STRIDES[layout](x)
    held = x.clone()
    states, _ = scan(
        cell, x, params, h0.transpose(0, 2).contiguous().transpose(0, 2), solver=solver, return_states=True
    )
    assert_close(states, loop(cell, held, params, h0))
    assert torch.equal(x, held), "x is only read"


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("time", [1, 2, 63, 64, 65, 1000])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_lengths(name, time, reverse):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 1, time, 4)
    want = (loop_reversed if reverse else loop)(cell, x, params, h0)
    for solver in (None, ps.MultipleShooting(64), ps.Newton()):
        states, h_n = scan(cell, x, params, h0, reverse=reverse, solver=solver, return_states=True)
        assert_close(states, want)
        assert_close(h_n, want[:, 0 if reverse else -1])


@pytest.mark.parametrize("name", CELLS)
def test_what_comes_back(name):
    """y is the output slot of the states, h_n all slots of the last; a missing h0 is zero."""
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, 30, 8)
    y, h_n, info = scan(cell, x, params, h0, return_info=True)
    states, _ = scan(cell, x, params, h0, return_states=True)
    assert y.shape == (2, 30, 8) and states.shape == (2, 30, len(cell.states), 8) and h_n.shape == h0.shape
    assert torch.equal(y, states[:, :, cell.output]) and torch.equal(h_n, states[:, -1])
    assert y.is_contiguous() and h_n.is_contiguous()
    assert info.iterations >= 1 and info.iterations_mean <= info.iterations and info.backend == "torch"
    assert set(info.to_dict()) == {"iterations", "iterations_mean", "defect", "chunk_length", "backend"}
    for a, b in zip(scan(cell, x, params, None), scan(cell, x, params, torch.zeros_like(h0)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("structure", ONE_OF_EACH)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_follow_x_and_h0(structure, stored):
    """y has x's dtype, h_n has h0's; parameters and h0 of fp32 go with any x, and are used at their full precision."""
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 70, 8, dtype=torch.float32)
    x = x.to(stored)
    y, h_n = scan(cell, x, params, h0, solver=ps.MultipleShooting(16))
    want = loop(cell, x.double(), [p.double() for p in params], h0.double())
    assert y.dtype == stored and h_n.dtype == torch.float32
    torch.testing.assert_close(h_n.double(), want[:, -1], rtol=1e-5, atol=1e-5)
    slack = {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(stored, 1e-6)
    torch.testing.assert_close(y.double(), want[:, :, cell.output], rtol=slack, atol=1e-5)
    assert scan(cell, x, [p.to(stored) for p in params], None)[1].dtype == stored
    assert scan(cell, x, params, h0.to(stored))[1].dtype == stored


def test_a_layer_takes_its_input_in_heads_too():
    layer = ps.ParaGRU(12, 8, 2, num_heads=4)
    x, lengths = torch.randn(2, 9, 12), torch.tensor([9, 4])
    assert all(
        torch.equal(a, b)
        for a, b in zip(layer(x.unflatten(2, (4, 3)), lengths=lengths), layer(x, lengths=lengths), strict=True)
    )
    with pytest.raises(
        ps.ArgumentError, match=r"\(2, 9, 3, 4\).*D = input_size = 12, or \(B, T, H, D / H\) = \(B, T, 4, 3\)"
    ):
        layer(x.unflatten(2, (3, 4)))
    with pytest.raises(ps.ArgumentError, match=r"D = input_size = 12$|D = input_size = 12\b(?!, or)"):
        ps.ParaGRU(12, 8)(x.unflatten(2, (1, 12)))


@pytest.mark.parametrize("both", [False, True])
def test_biases_begin_where_they_are_told(both):
    layer = ps.ParaGRU(6, 12, 2, num_heads=3, bidirectional=both, initial_bias={"z": (-6, 0), "c": 1})
    biases = [p for name, p in layer.named_parameters() if name.startswith("bias")]
    assert len(biases) == 2 + 2 * both
    for p in biases:
        assert p[0].tolist() == 3 * [-6.0, -4.0, -2.0, 0.0] and p[1].abs().max() == 0 and bool((p[2] == 1).all())
    expected = [p.clone() for p in biases]
    for p in biases:
        torch.nn.init.normal_(p)
    layer.reset_parameters()
    assert all(torch.equal(*pair) for pair in zip(biases, expected, strict=True))
    assert "initial_bias={'z': (-6, 0), 'c': (1, 1)}" in repr(layer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"initial_bias": {"f": 1}}, "initial_bias: got 'f'; expected one of z, r, c, the inputs of cell 'gru'"),
        ({"initial_bias": {"z": (1, 2, 3)}}, "initial_bias of z: got (1, 2, 3); expected a finite number, or"),
        ({"initial_bias": {"z": [0, float("nan")]}}, "initial_bias of z: got [0, nan]"),
        ({"initial_bias": {"z": "slow"}}, "initial_bias of z: got 'slow'"),
        ({"initial_bias": {"z": 1e300}}, "initial_bias of z: got 1e+300"),
        ({"dropout": "a"}, "dropout: got 'a'; expected a probability"),
        ({"recurrent_clip": "a"}, "recurrent_clip: got 'a'; expected None or a number > 0"),
        ({"initial_bias": {"z": 1}, "bias": False}, "initial_bias: got {'z': 1}; expected None with bias=False"),
    ],
)
def test_what_biases_cannot_begin_with_is_told(options, words):
    with pytest.raises(ps.ArgumentError, match=re.escape(words)):
        ps.ParaGRU(4, 4, **options)
    with pytest.raises(ps.ArgumentTypeError, match="initial_bias: got int 3; expected a dict"):
        ps.ParaGRU(4, 4, initial_bias=3)


@pytest.mark.parametrize("inplace", [False, True])
def test_outputs_of_steps_stay_as_they_are(inplace):
    layer, x = ps.ParaGRU(6, 8), torch.randn(2, 5, 6)
    with torch.no_grad():
        want, h, outputs = layer(x)[0], torch.zeros(1, 2, 1, 8), []
        for x_t in x.unbind(1):
            y, h = layer.step(x_t, h, inplace=inplace)
            outputs.append(y)
        torch.testing.assert_close(torch.stack(outputs, 1), want)
        before = h.clone()
        outputs[-1].zero_()
    assert torch.equal(h, before)


@pytest.mark.parametrize("time", [1, 3, 64])
def test_the_last_state_is_no_view_of_what_was_given(time):
    @ps.cell
    def its_input(h: ps.State, x: ps.Input):
        return x

    @ps.cell
    def itself(h: ps.State, x: ps.Input):
        return h

    x, h0 = torch.ones(1, time, 1, 2), torch.ones(1, 1, 2)
    for cell in (its_input, itself, ps.cells.elman_diagonal):
        for solver in (None, ps.Sequential(), ps.MultipleShooting(2)):
            y, h_n = ps.scan(cell, x, torch.ones(1, 2) if cell.params else None, h0, solver=solver)
            kept = y.clone()
            h_n.zero_()
            assert bool((x == 1).all() and (h0 == 1).all()) and torch.equal(y, kept)


@pytest.mark.parametrize("solver", [None, ps.Sequential(), ps.MultipleShooting(2)], ids=["auto", "loop", "2"])
@pytest.mark.parametrize("time", [1, 3, 4])
def test_a_state_of_parameters_only_is_that_of_each_step(time, solver):
    @ps.cell
    def gated(h: ps.State, g: ps.State, x: ps.Input, a: ps.Param):
        return torch.tanh(g * h + x), torch.sigmoid(a)

    a = torch.tensor([-2.0, 0.0, 2.0])
    y, h_n = ps.scan(gated, torch.randn(2, time, 1, 3), (a,), solver=solver, return_states=True)
    assert torch.equal(y[:, :, 1], torch.sigmoid(a).expand(2, time, 3)) and torch.equal(h_n[0, 1], torch.sigmoid(a))


@pytest.mark.parametrize("both", [False, True])
def test_what_stands_after_the_end_of_a_sequence_is_not_read(both):
    layer, x, lengths = ps.ParaGRU(6, 8, 2, bidirectional=both), torch.randn(2, 9, 6), torch.tensor([5, 9])
    found = []
    for value in (0.0, torch.nan):
        x[0, 5:] = value
        y, h_n = layer(x, lengths=lengths)
        found.append([y, h_n, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


MASKS = {
    "sum": lambda h, x: (h > 1) * 1.0 + (x > 1) * 1.0,
    "difference": lambda h, x: 1 - (h > 0.5) * 1.0,
    "larger": lambda h, x: torch.maximum((h > 1) * 1.0, (x > 0) * 1.0),
    "chosen": lambda h, x: torch.where(x > 0, (h > 0) * 1.0, (x < -1) * 1.0),
    "logical": lambda h, x: torch.logical_not(torch.relu(h - 1)) * torch.logical_or(h > 0, x > 1),
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks_are_numbers_where_numbers_are_meant(mask):
    @ps.cell
    def masked(h: ps.State, x: ps.Input):
        return 0.3 * h + 0.5 * x * (1 + MASKS[mask](h, x))

    torch.manual_seed(0)
    x, h0, found = 2 * torch.randn(2, 40, 1, 8), torch.randn(2, 1, 8), []
    for solver in (ps.MultipleShooting(8), None):
        given = x.double().requires_grad_()
        y = (
            ps.scan(masked, given, None, h0.double(), solver=solver)[0]
            if solver
            else loop(masked, given, [], h0.double())
        )
        y = y if solver else y[:, :, 0]
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), given)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", ["gru", "slstm", "headgru"])
def test_what_points_outward_is_dropped_from_a_sum_of_passes(cell):
    torch.manual_seed(0)
    layer = ps.RNN(getattr(ps.cells, cell), 4, 16, num_heads=2, recurrent_clip=0.2).double()
    for name, p in layer.named_parameters():
        if name.startswith("weight_hh"):
            torch.nn.init.normal_(p)
    x, target = torch.randn(6, 9, 4, dtype=torch.float64), torch.randn(6, 9, 16, dtype=torch.float64)
    grads = lambda: {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    (layer(x)[0] * target).sum().backward()
    whole = grads()
    layer.zero_grad()
    layer.drops_outward = False
    for k in range(6):
        (layer(x[k : k + 1])[0] * target[k : k + 1]).sum().backward()
    layer.drop_outward()
    for name, grad in grads().items():
        torch.testing.assert_close(grad, whole[name], rtol=1e-9, atol=1e-12)
