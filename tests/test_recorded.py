"""Passes recorded in CUDA graphs against the plain module: on a GPU as they are; without one, graphs that run what they recorded again
and, as graphs do, into the memory of the recording."""

import copy
import gc
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import parashoot as ps
from parashoot.parallel_plan import fixed
from parashoot.solve import recorded

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
MODULE = sys.modules["parashoot.parallelize"]
KINDS = {"gru": nn.GRU, "lstm": nn.LSTM, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}
OPTIONS = {
    "plain": {"batch_first": True},
    "stack": {"num_layers": 2, "bidirectional": True, "bias": False},
    "projected": {"proj_size": 2, "num_layers": 2},
}


class Again:
    pool = None

    def __init__(self, run, stream, pool=None):
        self.run, self.found = run, run()

    def replay(self):
        before, self.found = self.found, self.run()
        for old, new in zip(flat(before), flat(self.found), strict=True):
            old.data.copy_(new.data)


def flat(found):
    if isinstance(found, torch.Tensor):
        return [found]
    return [v for part in found or () for v in flat(part)]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_gpu)])
def device(request, monkeypatch):
    """Where every long enough shape is recorded."""
    if request.param == "cpu":
        monkeypatch.setattr(recorded, "Graph", Again)
        monkeypatch.setattr(recorded, "current", lambda device: None)
        monkeypatch.setattr(recorded, "warm", lambda run, device: run())
    monkeypatch.setattr(MODULE, "_room", lambda device: 2**40)
    monkeypatch.setattr(MODULE, "choose", lambda shape, horizons, *_: [fixed(32, h) for h in horizons])
    monkeypatch.setattr(MODULE._Parallel, "_seconds", lambda self, run, given: 0.0 if run() is None else 1.0)
    return torch.device(request.param)


def made(kind, options, device, hidden=6):
    torch.manual_seed(0)
    plain = KINDS[kind](3, hidden, **options).to(device, torch.float64)
    return plain, ps.parallelize(plain)


def inputs(device, seed, time=160, batch=2):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, 3, dtype=torch.float64, generator=draw).to(device).requires_grad_()


def results(module, x, hx=None):
    """Outputs, final states, and gradients of a fixed function of them by x, states and weights."""
    y, h = module(x if module.batch_first else x.transpose(0, 1), hx)
    out = [y, *(h if isinstance(h, tuple) else (h,))]
    draw = torch.Generator().manual_seed(9)
    parts = [(v * torch.randn(v.shape, dtype=v.dtype, generator=draw).to(v.device)).sum() for v in out]
    loss = torch.stack(parts).sum()
    leaves = [x, *(hx if isinstance(hx, tuple) else (hx,))] if hx is not None else [x]
    return [*(v.detach() for v in out), *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


def assert_equal(found, wanted, bound=1e-9):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and (a - b).abs().max() <= bound * b.abs().max().clamp_min(1.0)


def kept(module):
    return [r for _, slots in module.__dict__["_recordings"].values() for r in slots]


def learn(module, device, hx=None):
    """Calls until a recording settles: the first may have been made for a cell that was thought to forget faster."""
    for seed in range(12):
        results(module, inputs(device, seed), hx)
        if "_recordings" in vars(module) and kept(module) and all(r.usable for r in kept(module)):
            return kept(module)[0]
    raise AssertionError("nothing recorded")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_results_call_after_call_while_weights_change(kind, options, device):
    if options == "projected" and kind != "lstm":
        pytest.skip("an LSTM's option")
    plain, parallel = made(kind, OPTIONS[options], device)
    earlier = []
    for seed in range(12):
        x = inputs(device, seed)
        found, wanted = results(parallel, x), results(plain, x)
        assert_equal(found, wanted)
        earlier.append((found, [v.clone() for v in found]))
        with torch.no_grad():
            for p in plain.parameters():
                p.mul_(0.95)
    assert kept(parallel) and all(r.usable and r.turn > 4 for r in kept(parallel))
    assert all(torch.equal(a, b) for found, copies in earlier for a, b in zip(found, copies, strict=True))
    with torch.no_grad():
        for seed in range(5):
            assert_equal(parallel(inputs(device, seed))[0:1], plain(inputs(device, seed))[0:1])


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_initial_states_get_gradients(kind, device):
    plain, parallel = made(kind, {"batch_first": True}, device)
    h = torch.randn(1, 2, 6, dtype=torch.float64, device=device, requires_grad=True)
    hx = (h, h.detach().clone().requires_grad_()) if kind == "lstm" else h
    turn = learn(parallel, device, hx).turn
    for seed in range(5):
        x = inputs(device, seed)
        assert_equal(results(parallel, x, hx), results(plain, x, hx))
    assert kept(parallel)[0].turn == turn + 10  # forward and back


def test_calls_that_overlap_and_graphs_that_are_kept(device):
    plain, parallel = made("gru", {"batch_first": True}, device)
    x, other = inputs(device, 0), inputs(device, 1)
    learn(parallel, device)
    by = lambda y, given: torch.autograd.grad(y.square().sum(), [given, *plain.parameters()], retain_graph=True)
    first, second = parallel(x)[0], parallel(other)[0]  # the second while the first waits
    wanted = [by(plain(v)[0], v) for v in (x, other)]
    assert_equal(by(second, other), wanted[1])
    assert_equal(by(first, x), wanted[0])
    third = parallel(other)[0]
    assert_equal(by(first, x), wanted[0])  # again, when its memory has been given away
    assert_equal(by(third, other), wanted[1])
    assert_equal(by(third, other), wanted[1])
    turn = kept(parallel)[0].turn
    for _ in range(3):
        parallel(x)  # never taken back
    assert kept(parallel)[0].turn == turn + 3


def test_a_cell_that_comes_to_remember_is_solved_and_recorded_again(device):
    plain, parallel = made("gru", {"batch_first": True}, device)
    before = learn(parallel, device)
    with torch.no_grad():
        plain.get_parameter("bias_ih_l0")[6:12] += 6.0
    for seed in range(4, 20):
        x = inputs(device, seed)
        assert_equal(results(parallel, x), results(plain, x))
    assert before.failed and (not kept(parallel) or kept(parallel)[0] is not before)


def test_other_weights_and_needs_than_recorded(device):
    plain, parallel = made("lstm", {"batch_first": True}, device)
    learn(parallel, device)
    x = inputs(device, 5)
    plain.requires_grad_(False)
    leaf = lambda module: torch.autograd.grad(module(x)[0].square().sum(), x)
    assert_equal(leaf(parallel), leaf(plain))
    plain.requires_grad_(True)
    mine = copy.deepcopy(parallel)
    assert not kept(mine) and kept(parallel)
    other = made("lstm", {"batch_first": True}, device)[0]
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    values = {k: v.detach().clone().requires_grad_() for k, v in other.named_parameters()}
    y = torch.func.functional_call(parallel, values, (x,))[0]
    assert_equal([y.detach()], [other(x)[0].detach()])
    assert_equal(results(pickle.loads(pickle.dumps(parallel)), x), results(plain, x))


def test_what_cannot_be_recorded_runs_without(device, monkeypatch):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorded, "Graph", refuse)
    plain, parallel = made("gru", {"batch_first": True}, device)
    for seed in range(6):
        x = inputs(device, seed)
        assert_equal(results(parallel, x), results(plain, x))


def test_checkpointing_and_second_derivatives(device):
    plain, parallel = made("gru", {"batch_first": True}, device)
    x, turn = inputs(device, 6), learn(parallel, device).turn
    y = checkpoint(lambda v: parallel(v)[0], x, use_reentrant=False)
    assert isinstance(y, torch.Tensor) and kept(parallel)[0].turn == turn
    assert_equal(torch.autograd.grad(y.square().sum(), x), torch.autograd.grad(plain(x)[0].square().sum(), x))
    (d_x,) = torch.autograd.grad(parallel(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(ps.GradientError, match="first derivatives only"):
        d_x.sum().backward()


def test_shapes_that_are_kept_are_bounded(device):
    _, parallel = made("gru", {"batch_first": True}, device)
    for time in range(160, 160 + 32 * (MODULE.RECORDED + 2), 32):
        for seed in range(4):
            results(parallel, inputs(device, seed, time=time))
    assert len(kept(parallel)) == MODULE.RECORDED


class Once:
    """Does not keep what it ran, as a graph does not, and never runs it again."""

    pool = None

    def __init__(self, run, stream, pool=None):
        self.found = run()

    def replay(self):
        pass


def test_a_module_that_is_gone_leaves_nothing(device, monkeypatch):
    """Without waiting for the garbage collector: a recording holds much memory."""
    if device.type == "cpu":
        monkeypatch.setattr(recorded, "Graph", Once)
        monkeypatch.setattr(MODULE, "choose", lambda shape, horizons, *_: [fixed(32, (96, 96)) for _ in horizons])
    _, parallel = made("lstm", {"batch_first": True, "num_layers": 2}, device)
    with torch.no_grad():
        for seed in range(12):  # a recording may have to be made again
            parallel(inputs(device, seed).detach())
            if "_recordings" in vars(parallel) and kept(parallel):
                break
    gone = [weakref.ref(r) for r in kept(parallel)]
    gc.collect()
    gc.disable()
    try:
        del parallel
        assert gone and all(r() is None for r in gone)
    finally:
        gc.enable()


def test_what_is_counted_of_shapes_may_be_forgotten_before_their_recording(device):
    plain, parallel = made("gru", {"batch_first": True}, device)
    before = learn(parallel, device)
    parallel.__dict__["_calls"].clear()
    before.failed = True
    x = inputs(device, 3)
    assert_equal(results(parallel, x), results(plain, x))


def test_it_is_made_again_for_other_parameters_copies_and_shapes_that_come_back(device):
    plain, parallel = made("gru", {"batch_first": True}, device)
    first = learn(parallel, device)
    for p in plain.parameters():
        p.data = p.data.clone()
    for seed in range(30):
        x = inputs(device, seed)
        assert_equal(results(parallel, x), results(plain, x))
    assert kept(parallel)[0] is not first and kept(parallel)[0].usable
    assert learn(copy.deepcopy(parallel), device).usable and learn(ps.parallelize(parallel), device).usable
    for time in range(192, 192 + 32 * MODULE.RECORDED, 32):
        for seed in range(5):
            results(parallel, inputs(device, seed, time=time))
    again = len(parallel.__dict__["_recordings"])
    for seed in range(MODULE.AGAIN + 2):
        results(parallel, inputs(device, seed))
    assert parallel.info[0].recorded and len(parallel.__dict__["_recordings"]) == again == MODULE.RECORDED


def test_numbers_that_are_not_finite_are_not_its_failure(device):
    plain, parallel = made("gru", {"batch_first": True}, device)
    before, x = learn(parallel, device), inputs(device, 1)
    y = parallel(x)[0]
    torch.autograd.grad(y, x, torch.full_like(y, torch.inf))
    bad = x.detach().clone()
    bad[0, 40] = torch.nan
    with torch.no_grad():
        parallel(bad)
    assert kept(parallel)[0] is before and before.usable
    assert_equal(results(parallel, x), results(plain, x))
