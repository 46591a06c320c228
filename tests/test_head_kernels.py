"""Generated kernels for heads against the fp64 loop: in Triton's interpreter without a GPU, compiled with one."""

import pytest
import torch

import parashoot as ps
from oracle import by_loop, gradients, leaves, loop, random_problem, random_resets, relative
from parashoot.op import encode
from parashoot.tiling import Tiling

pytest.importorskip("triton")
from parashoot.triton import runtime
from test_kernels import BF16, DEVICE, KERNEL, ON_GPU, compare, fp32_problem, moved

pytestmark = [pytest.mark.gpu] if ON_GPU else []
GRU, LSTM = ps.cells.headgru, ps.cells.headlstm
# One chunk; several, led in from far enough; more than rows of a warp, too short a lead, a length that nothing divides.
ALONE, LED, CORRECTED = Tiling(16, 1, 2, 2, 1, 8, 1), Tiling(16, 1, 2, 2, 3, 12, 1), Tiling(16, 1, 2, 2, 5, 2, 1)


ROTOR = ps.cells.headrotor
CASES = [
    (GRU, ALONE),
    (GRU, LED),
    (GRU, CORRECTED),
    (LSTM, LED),
    (LSTM, CORRECTED),
    (GRU.with_width(5), LED),
    (ROTOR, ALONE),
    (ROTOR, CORRECTED),
]


@pytest.mark.parametrize(("cell", "chosen"), CASES, ids=range(len(CASES)))
def test_agrees_with_the_loop(cell, chosen, tiling):
    tiling(chosen)
    compare(cell, *fp32_problem(cell, 2, 15, 3 * cell.width, 0.5))


def test_wide_heads(tiling):
    tiling(Tiling(32, 1, 2, 2, 2, 8, 1))
    compare(GRU.with_width(20), *fp32_problem(GRU.with_width(20), 1, 16, 40, 0.5))


def test_more_chunks_than_rows_of_a_warp(tiling):
    tiling(Tiling(16, 1, 2, 2, 20, 12, 1))
    compare(GRU, *fp32_problem(GRU, 1, 36, 8, 0.5))


@pytest.mark.parametrize(("cell", "reverse"), [(GRU, False), (LSTM, True)], ids=["forward", "reverse"])
def test_resets_reverse_and_all_states(cell, reverse, tiling):
    tiling(CORRECTED)
    x, params, h0 = fp32_problem(cell, 2, 23, 16, 1.0)
    reset = random_resets(2, 23, share=0.15)
    reset[0, 0] = True
    compare(cell, x, params, h0, reset, reverse, all_states=reverse)


@ps.cell(structure="headwise", width=4)
def every_form(h: ps.State, x: ps.Input, R: ps.Param, Q: ps.Param, p: ps.Param):
    a = torch.matmul(R, (p * h)[..., None])[..., 0] + (Q * h[..., None, :]).sum(-1)
    return torch.tanh(a + x + torch.einsum("hji,...hj->...hi", R, torch.relu(x) - a))


def test_products_in_every_form_with_vectors_beside_matrices(tiling):
    """A matrix used twice and transposed: its gradient is a sum of outer products."""
    tiling(LED)
    x, params, h0 = fp32_problem(every_form, 2, 21, 12, 0.5)
    compare(every_form, x, [params[0], params[1], params[2]], h0)


@ps.cell(structure="headwise", width=4)
def latch(h: ps.State, x: ps.Input, R: ps.Param):
    held = torch.einsum("hij,...hj->...hi", R, torch.sign(h + 0.1))
    return torch.where(torch.abs(x) > 1.5, torch.sign(x), torch.sign(held)) * 0.9


def test_a_cell_that_latches_is_the_loop(tiling):
    """What the chunks' starts should be is known only in order."""
    tiling(Tiling(16, 1, 2, 2, 12, 2, 1))
    x, params, h0 = fp32_problem(latch, 1, 48, 8, 1.0)
    params = [params[0] + 2.0 * torch.eye(4)]
    info = compare(latch, x, params, h0, random_resets(1, 48, share=0.02))
    assert info.iterations == 3  # a correction brings nothing nearer


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell", [ROTOR, LSTM], ids=["one state", "two"])
def test_a_cell_that_does_not_forget_goes_on_from_what_is_exact(cell, reverse, tiling):
    """Several sequences in a program, a length that chunks do not divide, states saved for the backward pass."""
    tiling(Tiling(16, 1, 2, 2, 6, 2, 1))
    x, params, h0 = fp32_problem(cell, 3, 41, 16, 0.3)
    if cell is LSTM:
        x[:, :, cell.inputs.index("f")] += 8.0
    info = compare(cell, x, params, h0, random_resets(3, 41, share=0.01), reverse, all_states=reverse)
    assert info.iterations == 3


@ps.cell(structure="headwise", width=4)
def chaos(h: ps.State, x: ps.Input, R: ps.Param):
    a = torch.einsum("hij,...hj->...hi", R, h)
    return x + 1 - 1.8 * a * a


@pytest.mark.parametrize(("chunks", "each"), [(16, 32), (2, 48)])
def test_every_step_follows_from_the_one_before_where_roundings_grow(chunks, each, tiling, monkeypatch):
    """Corrections begin again from chunks whose ends the first launch, compiled otherwise, wrote a rounding off. Without a GPU it
    is the same code, so the rounding is put in."""
    if not ON_GPU:
        execute, rounding = runtime._execute, "    v0 = v0 * (1.0 + 1.2e-7) if LEAD else v0\n    n = steps\n"
        monkeypatch.setattr(runtime, "_execute", lambda s, n: execute(s.replace("    n = steps\n", rounding), n))
        monkeypatch.setattr(runtime, "load", runtime.load.__wrapped__)
    tiling(Tiling(16, 1, 1, 2, chunks, 4, 1))
    x, R = 0.01 * torch.randn(1, chunks * each, 1, 16), torch.eye(4)[[1, 2, 3, 0]].repeat(4, 1, 1)
    h0 = 0.3 * torch.randn(1, 1, 16)
    gx, (matrices,), gh = moved(x, [R], h0)
    y = ps.scan(chaos, gx, (matrices,), gh, solver=KERNEL)[0].cpu()
    before = torch.cat([h0, y[:, :-1]], 1).double().unflatten(-1, (4, 4))
    follows = chaos.step(before, x[:, :, 0].double().unflatten(-1, (4, 4)), R.double()).flatten(2)
    assert float((follows - y).abs().max()) <= 1e-6


def test_a_sequence_does_not_set_the_tolerance_of_another(tiling):
    """Two in one program; the one that forgets at once has a gradient a million times as large."""
    tiling(Tiling(16, 1, 2, 2, 8, 8, 1))
    x, params, h0 = fp32_problem(GRU, 2, 192, 16, 0.3)
    x[:, :, 0] += torch.tensor([-1.0, 4.0])[:, None, None]
    dy = torch.randn(2, 192, 16) * torch.tensor([1.0, 1e6])[:, None, None]
    want = gradients(by_loop(GRU), x.double(), [p.double() for p in params], h0.double(), dy.double(), None)[0]
    gx, gp, gh = moved(x, params, h0)
    run = lambda x, p, h: ps.scan(GRU, x, tuple(p), h, solver=KERNEL)
    got = gradients(run, gx, gp, gh, dy.to(DEVICE), None)[0]
    assert relative(got[:1].cpu(), want[:1]) <= 1e-5


def test_the_limit_counts_passes(tiling):
    tiling(Tiling(16, 1, 2, 2, 8, 2, 1))
    x, params, h0 = fp32_problem(GRU, 1, 48, 8, 0.3)
    x[:, :, 0] -= 6.0  # it remembers for hundreds of steps
    x, params, h0 = moved(x, params, h0)
    run = lambda n: ps.scan(
        GRU, x, tuple(params), h0, solver=ps.MultipleShooting(backend="triton", max_iters=n), return_info=True
    )
    assert run(3)[2].iterations == 3  # a correction brings nothing nearer: the next pass is the loop
    with pytest.raises(ps.ConvergenceError):
        run(2)


@pytest.mark.parametrize(("value", "chosen"), [(float("nan"), ALONE), (float("inf"), CORRECTED)], ids=["nan", "inf"])
def test_what_is_not_finite_stays_in_its_head_until_a_reset(value, chosen, tiling):
    """Two heads lie in one tile, whose product would take it from one to the other; gradients too."""
    tiling(chosen)
    x, params, h0 = fp32_problem(GRU, 2, 24, 16, 0.5)
    x[0, 7, 2, 1] = value
    reset = torch.zeros(2, 24, dtype=torch.bool)
    reset[0, 17] = True
    wide = x.double(), [p.double() for p in params], h0.double()
    want = by_loop(GRU, reset)(*wide)[0]
    gx, gp, gh = moved(x, params, h0)
    run = lambda x, p, h: ps.scan(GRU, x, tuple(p), h, reset=reset.to(DEVICE), solver=KERNEL)
    y = run(gx, gp, gh)[0].cpu().double()
    torch.testing.assert_close(y, want, atol=1e-5, rtol=0.0, equal_nan=True)
    assert bool(y[0, 17:].isfinite().all()) and bool(y[0, :, 8:].isfinite().all()) and bool(y[1].isfinite().all())
    dy = torch.randn(2, 24, 16)
    got = gradients(run, gx, gp, gh, dy.to(DEVICE), None)
    exact = gradients(by_loop(GRU, reset), *wide, dy.double(), None)
    assert relative(got[0][:, :, :, 8:].cpu(), exact[0][:, :, :, 8:]) <= 1e-4
    assert relative(got[1][1].cpu(), exact[1][1]) <= 1e-4


@ps.cell(structure="headwise", width=4)
def growth(h: ps.State, x: ps.Input, R: ps.Param):
    return torch.einsum("hij,...hj->...hi", R, h) + x


def test_what_overflows_only_in_order_stays_in_its_head(tiling):
    """From wrong starts every chunk and each of its corrections is finite; the true sequence, of one head of a tile, is not."""
    tiling(Tiling(16, 1, 2, 2, 8, 2, 1))
    x, _, h0 = fp32_problem(growth, 1, 96, 8, 0.5)
    x[..., :4], h0[..., :4] = 0.0, 1.0
    matrices = torch.stack([6.0 * torch.eye(4), 0.5 * torch.randn(4, 4)])
    gx, (R,), gh = moved(x, [matrices], h0)
    y, _, info = ps.scan(growth, gx, (R,), gh, solver=KERNEL, return_info=True)
    want = by_loop(growth)(x.double(), [matrices.double()], h0.double())[0]
    assert info.iterations == 3
    assert relative(y[..., 4:].cpu(), want[..., 4:]) <= 1e-5
    assert relative(y[:, :48, :4].cpu(), want[:, :48, :4]) <= 1e-5 and not y[0, 60:, :4].isfinite().any()


@pytest.mark.parametrize(
    ("cell", "dtype", "slope", "floor"),
    [(LSTM, torch.float16, 2**-10, 1e-4), (GRU, torch.bfloat16, BF16, 5e-4)],
    ids=["fp16", "bf16"],
)
def test_short_storage_types(cell, dtype, slope, floor, tiling):
    tiling(LED)
    x, params, h0 = fp32_problem(cell, 1, 16, 16, 0.3)
    x = x.to(dtype)
    wide = x.double(), [p.double() for p in params], h0.double()
    oracle = by_loop(cell)
    want = oracle(*wide)[0]
    gx, gp, gh = moved(x, params, h0)
    run = lambda x, p, h: ps.scan(cell, x, tuple(p), h, solver=KERNEL)
    y = run(gx, gp, gh)[0]
    assert y.dtype == dtype
    assert bool(((y.cpu().double() - want).abs() <= slope * want.abs() + floor).all())
    dy = torch.randn(y.shape).to(dtype)
    found = gradients(run, gx, gp, gh, dy.to(DEVICE), None)
    wanted = gradients(oracle, *wide, dy.double(), None)
    assert max(relative(g.cpu(), w) for g, w in zip(found, wanted, strict=True)) <= 2e-2


def test_channels_in_heads_and_strides_are_read_in_place(tiling):
    tiling(Tiling(16, 1, 2, 2, 1, 8, 1))
    x, params, h0 = fp32_problem(GRU, 1, 3, 256, 0.5)
    heads = x.unflatten(3, (2, 128)).permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)
    dy = torch.randn(1, 3, 256)
    oracle = by_loop(GRU)
    wide = x.double(), [p.double() for p in params], h0.double()
    want = gradients(oracle, *wide, dy.double(), None)
    gx, gp, gh, gdy = moved(heads, params, h0, dy)
    run = lambda x, p, h: ps.scan(GRU, x, tuple(p), h, solver=KERNEL)
    assert float((run(gx, gp, gh)[0].cpu() - oracle(*wide)[0]).abs().max()) <= 1e-5
    got = gradients(run, gx, gp, gh, gdy, None)
    assert relative(got[0].flatten(3).cpu(), want[0]) <= 1e-4
    assert max(relative(g.cpu(), w) for g, w in zip(got[1:], want[1:], strict=True)) <= 1e-4
    strided = torch.stack([x, x], -1).to(DEVICE)[..., 0]
    assert torch.equal(run(strided, gp, gh)[0], run(strided.contiguous(), gp, gh)[0])


@pytest.mark.parametrize(("time", "channels"), [(1, 2), (3, 6)])
def test_small_and_odd_sizes_by_the_plan_itself(time, channels):
    compare(LSTM.with_width(2), *fp32_problem(LSTM.with_width(2), 2, time, channels, 0.5))


def test_compiled_into_one_graph(tiling):
    tiling(LED)
    x, params, h0 = moved(*fp32_problem(LSTM, 1, 9, 8, 0.5))
    run = lambda x, p, h: ps.scan(LSTM, x, tuple(p), h, solver=KERNEL)
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    dy, dh = torch.randn(1, 9, 8, device=DEVICE), torch.randn_like(h0)
    got, want = (gradients(f, x, params, h0, dy, dh) for f in (compiled, run))
    assert max(relative(g, w.double()) for g, w in zip(got, want, strict=True)) <= 1e-5
    arguments = (*leaves(x), leaves(*params), *leaves(h0), None, LSTM.key, False, False, True, True, *encode(KERNEL))
    torch.library.opcheck(torch.ops.parashoot.scan.default, arguments, test_utils="test_faketensor")


@ps.cell(structure="headwise", width=4)
def reflected(h: ps.State, k: ps.Input, x: ps.Input, p: ps.Param, R: ps.Param):
    """Sums over a head's channels: of products, of a parameter, of what has none left, and of a sum that is used twice."""
    g = h + p / (1 + p.square().sum(-1, keepdim=True))
    g = g - 2 * k * torch.einsum("...i,...i->...", k, g)[..., None] / (1 + (k * k).sum(-1, keepdim=True))
    mean = g.mean(-1, keepdim=True)
    return torch.tanh(
        (g - mean) * torch.rsqrt((g - mean).square().mean(-1, keepdim=True) + 1)
        + mean * torch.einsum("hij,...hj->...hi", R, x)
    )


@pytest.mark.parametrize("chosen", [ALONE, LED, CORRECTED], ids=["alone", "led", "corrected"])
def test_sums_over_the_channels_of_a_head(chosen, tiling):
    tiling(chosen)
    compare(reflected, *fp32_problem(reflected, 2, 17, 12, 0.7))


@ps.cell(structure="headwise", width=4)
def normalized(h: ps.State, x: ps.Input):
    return torch.softmax(h + x, -1)


@pytest.mark.parametrize(
    ("cell", "options", "reason"),
    [
        (GRU.with_width(64), {}, "at most 32 channels"),
        (normalized, {}, "softmax"),
        (GRU.with_width(1), {}, "a head of one channel"),
        (GRU, {"jacobian": "diagonal"}, "zero Jacobians"),
    ],
    ids=["width", "operation", "one channel", "jacobian"],
)
def test_a_head_that_kernels_do_not_run_says_why(cell, options, reason):
    x, params, h0 = moved(*random_problem(cell, 1, 20, 64, dtype=torch.float32))
    with pytest.raises(ps.BackendError, match=reason):
        ps.scan(cell, x, tuple(params) or None, h0, solver=ps.MultipleShooting(backend="triton", **options))
    y, _, info = ps.scan(cell, x, tuple(params) or None, h0, solver=ps.MultipleShooting(**options), return_info=True)
    assert info.backend == "torch"
    want = loop(cell, x.double().cpu(), [p.double().cpu() for p in params], h0.double().cpu())[:, :, cell.output]
    assert relative(y.cpu(), want) <= 1e-5


@pytest.mark.skipif(not ON_GPU, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize("name", ["headgru", "headlstm", "headrotor"])
def test_the_numerics_contract_at_length(name, width, sigma, dtype):
    """fp32: states within 1e-5 or twice the error of the loop in fp32, gradients within 1e-4; bf16: 2^-8 of y and 5e-4."""
    cell = getattr(ps.cells, name).with_width(width)
    x, params, h0 = fp32_problem(cell, 2, 2048, 64, sigma)
    x = x.to(dtype)
    wide = x.double(), [p.double() for p in params], h0.double()
    exact, plain = loop(cell, *wide), loop(cell, x.float(), params, h0)
    if dtype == torch.float32:
        compare(cell, x, params, h0, bounds=(max(1e-5, 2 * float((plain - exact).abs().max())), 1e-4))
        return
    gx, gp, gh = moved(x, params, h0)
    y, want = ps.scan(cell, gx, tuple(gp), gh, solver=KERNEL)[0], exact[:, :, cell.output]
    assert bool(((y.cpu().double() - want).abs() <= 2**-8 * want.abs() + 5e-4).all())


@ps.cell(structure="headwise", width=4)
def growing(h: ps.State, x: ps.Input, W: ps.Param):
    return torch.tanh(torch.einsum("hij,...hj->...hi", W, h) + x)


def test_what_is_small_may_grow(tiling):
    """States and gradients within the tolerance at first, forward and backward."""
    tiling(Tiling(16, 1, 2, 2, 8, 8, 1))
    W, x, h0 = 1.2 * torch.eye(4).repeat(2, 1, 1), torch.zeros(1, 128, 1, 8), torch.full((1, 1, 8), 1e-10)
    want = loop(growing, x.double(), [W.double()], h0.double())[:, :, 0]
    gx, gW, gh = moved(x, W, h0)
    y, _ = ps.scan(growing, gx, (gW,), gh, solver=KERNEL)
    assert float(want[0, -1, 0]) > 0.5 and float((y.cpu() - want).abs().max()) < 1e-5
    found = []
    for run in (lambda *given: ps.scan(growing, *given, solver=KERNEL), by_loop(growing)):
        given = [v.to(gh.device if not found else "cpu", torch.float64 if found else torch.float32) for v in (x, W, h0)]
        start = torch.zeros_like(given[2], requires_grad=True)
        y = run(given[0], [given[1]], start)[0]
        (y[:, 0].sum() + 1e-10 * y[:, -1].sum()).backward()
        assert start.grad is not None
        found.append(start.grad.double().cpu())
    torch.testing.assert_close(*found, rtol=1e-5, atol=0.0)


def test_a_gradient_of_the_last_step_takes_two_passes(tiling, monkeypatch):
    """What comes from there fades, chunk by chunk: the second pass shows it."""
    tiling(Tiling(16, 1, 2, 2, 8, 16, 1))
    reports, jobs = [], runtime._jobs_for_heads
    monkeypatch.setattr(runtime, "_jobs_for_heads", lambda *given: reports.append(jobs(*given)) or reports[-1])
    monkeypatch.setattr(
        runtime, "compile_together", lambda *given: None
    )  # on a GPU it asks for jobs too, which do not run
    W, x = 0.3 * torch.eye(4).repeat(2, 1, 1), torch.randn(1, 128, 1, 8)
    gx, gW = moved(x, W)
    gx.requires_grad_()
    ps.scan(growing, gx, (gW,), solver=KERNEL)[0][:, -1].sum().backward()
    assert [float(report[..., 0].max()) for _, report in reports] == [1, 2]
