"""Parallelized modules against the modules they come from: outputs, states and gradients, options, lifecycle, errors."""

import copy
import io
import pickle
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import parashoot as ps
from parashoot.parallel_plan import Shape, choose, fixed
from parashoot.parallelize import ParallelGRU, _shoot
from parashoot.solve.black_box import Record, Task, solve
from parashoot.solve.chunks import cut

MODULE = sys.modules["parashoot.parallelize"]  # whose name in the package is the function's
CHUNKS = ps.MultipleShooting(chunk_length=16)
KINDS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k)}
OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "stack": {"num_layers": 2, "bidirectional": True, "bias": False},
    "dropout": {"num_layers": 3, "dropout": 0.4},
}


class Mine(nn.GRU):
    pass


def tensors(out):
    """(y, h_n) or (y, (h_n, c_n)) flat, a packed y by its data."""
    y, h = out
    return [getattr(y, "data", y) if not isinstance(y, torch.Tensor) else y, *(h if isinstance(h, tuple) else (h,))]


def assert_same(plain, parallel, inputs, hx=None, bound=1e-10):
    """Results, and gradients of a random function of all of them by inputs, states and weights."""
    torch.manual_seed(3)
    wanted = tensors(plain(inputs, hx))
    torch.manual_seed(3)
    found = tensors(parallel(inputs, hx))
    leaves = [v for v in (getattr(inputs, "data", inputs), *(hx if isinstance(hx, tuple) else (hx,))) if v is not None]
    if not isinstance(inputs, torch.Tensor):
        leaves[0] = inputs.data
    leaves = [v for v in leaves if v.requires_grad] + list(plain.parameters())
    weights = [torch.randn_like(v) for v in wanted]
    grads = [
        torch.autograd.grad(torch.stack([(v * w).sum() for v, w in zip(out, weights, strict=True)]).sum(), leaves)
        for out in (wanted, found)
    ]
    for a, b in zip((*wanted, *grads[0]), (*found, *grads[1]), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= bound * a.abs().max().clamp_min(1.0)


def made(kind, **options):
    return KINDS[kind](3, 6, **options).double()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", [1, 16, 40, 64])
def test_same_results_and_gradients(kind, options, time):
    plain = made(kind, **OPTIONS[options])
    parallel = ps.parallelize(plain, CHUNKS)
    shape = (2, time, 3) if plain.batch_first else (time, 2, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert_same(plain, parallel, x)
    assert max(r.chunk_length for r in parallel.info) == min(time, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_states_and_inputs_without_batch(kind):
    plain = made(kind, num_layers=2, bidirectional=True, batch_first=True)
    parallel = ps.parallelize(plain, CHUNKS)
    for batch in ((2,), ()):
        x = torch.randn(*batch, 40, 3, dtype=torch.float64, requires_grad=True)
        h = [torch.randn(4, *batch, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        assert_same(plain, parallel, x, tuple(h) if kind == "lstm" else h[0])


def test_projections():
    plain = nn.LSTM(3, 6, 2, proj_size=2, bidirectional=True).double()
    h = (torch.randn(4, 2, 2, dtype=torch.float64), torch.randn(4, 2, 6, dtype=torch.float64))
    x = torch.randn(40, 2, 3, dtype=torch.float64, requires_grad=True)
    assert_same(plain, ps.parallelize(plain, CHUNKS), x, h)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ordered", [True, False])
def test_packed_sequences(kind, ordered):
    plain = made(kind, num_layers=2, bidirectional=True)
    parallel = ps.parallelize(plain, CHUNKS)
    lengths = (50, 33, 33, 16, 1) if ordered else (16, 50, 1, 33, 33)
    packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths], enforce_sorted=ordered)
    packed = packed._replace(data=packed.data.requires_grad_())
    h = [torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert_same(plain, parallel, packed)
    assert_same(plain, parallel, packed, tuple(h) if kind == "lstm" else h[0])
    y, n = pad_packed_sequence(parallel(packed)[0])
    assert tuple(n) == lengths and y.shape == (50, 5, 12)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("remembers", [False, True])
def test_chunks_that_settle_in_few_passes_and_in_as_many_as_there_are(kind, remembers):
    """fp64 against the loop's answer within rounding, and never more passes than chunks."""
    plain = made(kind)
    with torch.no_grad():
        if remembers:
            for p in plain.parameters():
                p.mul_(8.0)  # chaotic
    parallel = ps.parallelize(plain, ps.MultipleShooting(chunk_length=4, tol=0.0 if remembers else 1e-12))
    x = torch.randn(48, 2, 3, dtype=torch.float64)
    y = parallel(x)[0]
    assert (y - plain(x)[0]).abs().max() < 1e-8
    assert parallel.info[0].passes <= 13
    with torch.no_grad():
        assert (parallel(x)[0] - plain(x)[0]).abs().max() < 1e-8


def test_single_precision_is_within_its_claim():
    for kind in ("gru", "lstm", "rnn"):
        plain = KINDS[kind](32, 32)
        x = torch.randn(512, 2, 32, requires_grad=True)
        assert_same(plain, ps.parallelize(plain, ps.MultipleShooting(chunk_length=64)), x, bound=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_guesses_from_parts_of_long_chunks(kind):
    """At first the part is too short for double precision, which the passes after it mend; later it is not."""
    plain = made(kind)
    parallel = ps.parallelize(plain, ps.MultipleShooting(chunk_length=160))
    x = torch.randn(640, 2, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        assert_same(plain, parallel, x)
    assert parallel.info[0].passes == 2


@pytest.mark.parametrize(("affordable", "rests"), [(100.0, False), (0.0, True)])
def test_a_backward_pass_that_needs_more_than_was_expected(affordable, rests):
    """It makes the passes that are missing, or, where they cost too much, runs backward through whole sequences."""
    plain, x = made("lstm"), torch.randn(80, 3, dtype=torch.float64, requires_grad=True)
    cuts = [cut((80,), n, False, False, x.device) for n in (8, 80)]
    record, initial = Record(), [torch.zeros(1, 6, dtype=torch.float64) for _ in range(2)]
    task = Task(partial(_shoot, "LSTM", True), cuts[0], lambda: cuts[1], 1e-12, 8, (10, 2), affordable, None, record)
    leaves = [x, *plain.parameters()]
    grads = [
        torch.autograd.grad(y.square().sum(), leaves)
        for y in (solve(task, x, initial, plain.all_weights[0])[0], plain(x)[0])
    ]
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(*grads, strict=True))
    assert (record.rest > 0) == rests and (rests or record.backward_passes > 2)


def test_gradients_against_finite_differences():
    parallel = ps.parallelize(made("lstm"), ps.MultipleShooting(chunk_length=3))
    x = torch.randn(8, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: parallel(v)[0], x)


def test_infinities_and_nans_poison_what_the_loop_poisons():
    plain = made("gru")
    x = torch.randn(64, 3, 3, dtype=torch.float64)
    x[20, 1], x[40, 2, 0] = float("nan"), float("inf")
    for solver in (CHUNKS, None):
        y, wanted = ps.parallelize(plain, solver)(x)[0], plain(x)[0]
        assert torch.equal(y.isnan(), wanted.isnan())
        assert (y - wanted).nan_to_num().abs().max() < 1e-10


def test_only_what_is_asked_for_gets_a_gradient():
    plain = made("gru")
    parallel = ps.parallelize(plain, CHUNKS)
    plain.weight_hh_l0.requires_grad_(False)
    y, _ = parallel(torch.randn(40, 2, 3, dtype=torch.float64))
    y.sum().backward()
    assert plain.weight_hh_l0.grad is None and plain.weight_ih_l0.grad is not None
    with torch.no_grad():
        assert not parallel(torch.randn(40, 2, 3, dtype=torch.float64))[0].requires_grad
    with torch.inference_mode():
        assert parallel(torch.randn(40, 2, 3, dtype=torch.float64))[0].shape == (40, 2, 6)


def test_the_same_class_parameters_and_state_dict():
    plain = nn.LSTM(3, 6, 2, dropout=0.1, bidirectional=True)
    parallel = ps.parallelize(plain)
    assert isinstance(parallel, nn.LSTM) and type(plain) is nn.LSTM
    assert all(a is b for a, b in zip(plain.parameters(), parallel.parameters(), strict=True))
    assert list(plain.state_dict()) == list(parallel.state_dict())
    other = ps.parallelize(nn.LSTM(3, 6, 2, bidirectional=True))
    other.load_state_dict(plain.state_dict())
    plain.load_state_dict(other.state_dict())
    parallel.eval()
    assert plain.training and not parallel.training
    assert repr(parallel) == "ParallelLSTM" + repr(plain).removeprefix("LSTM")
    again = ps.parallelize(parallel, CHUNKS)
    assert type(again) is type(parallel) and again.solver is CHUNKS and parallel.solver is None


def test_copies_pickles_and_conversions():
    parallel = ps.parallelize(made("gru", num_layers=2), CHUNKS)
    x = torch.randn(40, 2, 3, dtype=torch.float64)
    wanted = parallel(x)[0]
    file = io.BytesIO()
    torch.save(parallel, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(parallel), pickle.loads(pickle.dumps(parallel)), loaded):
        assert torch.equal(other(x)[0], wanted) and other.weight_hh_l0 is not parallel.weight_hh_l0
        other.flatten_parameters()
        assert other.float()(x.float())[0].dtype == torch.float32
        assert parallel.weight_hh_l0.dtype == torch.float64


def test_weights_from_elsewhere():
    plain = made("gru")
    parallel = ps.parallelize(plain, CHUNKS)
    x = torch.randn(40, 2, 3, dtype=torch.float64)
    weights = {k: torch.randn_like(v, requires_grad=True) for k, v in plain.state_dict().items()}
    y, wanted = (torch.func.functional_call(m, weights, x)[0] for m in (parallel, plain))
    assert (y - wanted).abs().max() < 1e-10
    assert torch.autograd.grad(y.sum(), list(weights.values()))[0].abs().max() > 0


def test_in_a_compiled_model():
    parallel = ps.parallelize(made("gru"), CHUNKS)
    model = torch.compile(lambda x: parallel(2 * x)[0].tanh(), backend="eager")
    x = torch.randn(40, 2, 3, dtype=torch.float64)
    assert torch.equal(model(x), parallel(2 * x)[0].tanh())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_and_offloading(reentrant):
    parallel = ps.parallelize(made("lstm"), CHUNKS)
    x = torch.randn(40, 2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *parallel.parameters()]
    wanted = torch.autograd.grad(parallel(x)[0].square().sum(), leaves)
    y = checkpoint(lambda v: parallel(v)[0], x, use_reentrant=reentrant)
    y.square().sum().backward()
    with torch.autograd.graph.save_on_cpu():
        offloaded = torch.autograd.grad(parallel(x)[0].square().sum(), leaves)
    for a, b, v in zip(wanted, offloaded, leaves, strict=True):
        assert torch.allclose(v.grad, a, rtol=1e-9, atol=1e-10) and torch.allclose(b, a, rtol=1e-9, atol=1e-10)


def test_a_graph_that_is_kept_can_be_used_again_and_one_that_is_not_cannot():
    parallel = ps.parallelize(made("gru"), CHUNKS)
    x = torch.randn(40, 2, 3, dtype=torch.float64, requires_grad=True)
    y = parallel(x)[0]
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=keep)[0] for keep in (True, False))
    assert torch.allclose(first, second, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)


def test_second_derivatives_are_refused():
    parallel = ps.parallelize(made("gru"), CHUNKS)
    x = torch.randn(40, 2, 3, dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(parallel(x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(ps.GradientError, match="first derivatives only"):
        g.sum().backward()


def test_autocast_gives_the_types_of_the_plain_module():
    plain = nn.LSTM(3, 6)
    x = torch.randn(128, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert ps.parallelize(plain, CHUNKS)(x)[0].dtype == plain(x)[0].dtype


def test_half_precision():
    plain = nn.GRU(16, 32).bfloat16()
    x = torch.randn(128, 2, 16, dtype=torch.bfloat16)
    y, wanted = ps.parallelize(plain, ps.MultipleShooting(chunk_length=32))(x)[0], plain(x)[0]
    assert y.dtype == torch.bfloat16 and (y - wanted).abs().max() < 0.02


def test_a_limit_that_is_missed():
    plain = made("gru")
    parallel = ps.parallelize(plain, ps.MultipleShooting(chunk_length=4, max_iters=2))
    with pytest.raises(ps.ConvergenceError, match="max_iters=2"):
        parallel(torch.randn(64, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("module", "name"), [(nn.Linear(2, 2), "Linear"), (nn.GRUCell(2, 2), "GRUCell"), ("x", "str"), (None, "None")]
)
def test_other_modules_are_refused_by_name(module, name):
    with pytest.raises(ps.ArgumentTypeError, match=name):
        ps.parallelize(module)


def test_options_that_need_a_jacobian_or_a_kernel_are_refused():
    with pytest.raises(ps.ArgumentTypeError, match="Mine"):
        ps.parallelize(Mine(2, 2))
    with pytest.raises(ps.ArgumentTypeError, match="solver"):
        ps.parallelize(nn.GRU(2, 2), "fast")  # type: ignore[arg-type]
    for solver, message in (
        (ps.MultipleShooting(jacobian="diagonal"), "jacobian"),
        (ps.MultipleShooting(backend="triton"), "backend"),
    ):
        with pytest.raises(ps.ArgumentError, match=message):
            ps.parallelize(nn.GRU(2, 2), solver)


def test_misuse_raises_what_the_plain_module_raises():
    plain = nn.GRU(3, 6)
    parallel = ps.parallelize(plain, CHUNKS)
    x = torch.randn(40, 2, 3)
    for arguments in ((x[..., :2],), (x[0, 0],), (x, x), (x, torch.zeros(1, 3, 6)), (x.double(),)):
        with pytest.raises((RuntimeError, ValueError)) as wanted:
            plain(*arguments)
        with pytest.raises((RuntimeError, ValueError)) as found:
            parallel(*arguments)
        assert str(found.value) == str(wanted.value) and found.type is wanted.type


def test_the_plan_takes_chunks_where_they_pay():
    shape = Shape("GRU", 256, 256, 0, 1, 1, 2048, 8 * 2048, torch.float32, "cuda", 1, False, True)
    found, *_ = choose(shape, ((32, 32),)) or [None]
    assert found and 32 <= found.length <= 64 and found.passes == (2, 2)
    assert choose(shape, ((2000, 2000),)) is None
    assert choose(shape._replace(time=64, total=512), ((32, 32),)) is None


def test_a_module_that_remembers_runs_plainly_and_gets_another_chance():
    plain = nn.RNN(4, 16, nonlinearity="relu")
    with torch.no_grad():
        plain.state_dict()["weight_hh_l0"].copy_(torch.eye(16))
    parallel = ps.parallelize(plain)
    x = 0.01 * torch.randn(2048, 1, 4)
    for _ in range(3):
        parallel(x)[0].sum().backward()
    assert torch.equal(parallel(x)[0], plain(x)[0]) and parallel.info[0].chunk_length == 0
    with torch.no_grad():
        plain.state_dict()["weight_hh_l0"].zero_()
    for _ in range(100):
        parallel(x)
    assert parallel.info[0].chunk_length > 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_chunks_that_are_slower_than_predicted_are_left(packed, monkeypatch):
    plain = nn.GRU(4, 8, 2, dropout=0.5)
    parallel = ps.parallelize(plain)
    monkeypatch.setattr(MODULE, "choose", lambda shape, horizons, *_: [fixed(64, h) for h in horizons])
    seconds = iter([2.0, 0.1])  # over chunks, and plainly
    monkeypatch.setattr(ParallelGRU, "_seconds", lambda *_: next(seconds))
    x = torch.randn(2048, 1, 4)
    given = pack_sequence([x[:, 0], x[:900, 0]]) if packed else x
    for _ in range(MODULE.TIMED - 1):
        parallel(given)
        assert parallel.info[0].chunk_length == 64
    parallel(given)
    assert parallel.info[0].chunk_length == 0 and parallel.info[0].rest > 0


def test_the_plan_learns_from_timing_how_fast_the_plain_module_is(monkeypatch):
    """It does not try again what it now expects to be slower."""
    parallel, x = ps.parallelize(nn.GRU(4, 8)), torch.randn(2048, 1, 4)
    seconds = iter([2.0, 1e-6])  # over chunks, and plainly: then it would end
    monkeypatch.setattr(ParallelGRU, "_seconds", lambda *_: next(seconds))
    parallel(x)
    assert parallel.info[0].chunk_length > 0
    for _ in range(100):
        parallel(x)
    assert parallel.info[0].chunk_length == 0 and parallel.info[0].rest == 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_timing_leaves_no_trace(packed, monkeypatch):
    """No random numbers drawn, no gradients."""
    monkeypatch.setattr(MODULE, "TIMED", 1)
    monkeypatch.setattr(MODULE, "choose", lambda shape, horizons, *_: [fixed(64, h) for h in horizons])
    plain = nn.GRU(4, 8, 2, dropout=0.5).double()
    parallel = ps.parallelize(plain)
    x = torch.randn(700, 2, 4, dtype=torch.float64, requires_grad=True)
    given = pack_sequence([x[:, 0], x[:300, 1]]) if packed else x
    ran, seconds = [], ParallelGRU._seconds
    monkeypatch.setattr(ParallelGRU, "_seconds", lambda *a: ran.append(seconds(*a)) or float(len(ran)))
    before = torch.get_rng_state()
    parallel(given)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    ps.parallelize(plain, ps.MultipleShooting(chunk_length=64))(given)
    assert len(ran) == 2 and min(ran) > 0.0 and torch.equal(torch.get_rng_state(), after)
    assert x.grad is None and all(p.grad is None for p in plain.parameters())


def test_what_is_remembered_of_shapes_is_bounded(monkeypatch):
    monkeypatch.setattr(MODULE, "SHAPES", 3)
    parallel = ps.parallelize(nn.RNN(2, 2))
    for time in range(1024, 1034):
        parallel(torch.randn(time, 1, 2))
    assert 0 < len(parallel.__dict__["_calls"]) <= 3


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_roundings_of_bfloat16_are_not_taken_for_memory(bias):
    """Within twice the plain module's error, by the same in fp64; and the passes do not grow from call to call."""
    plain = nn.GRU(16, 32, batch_first=True)
    with torch.no_grad():
        plain.get_parameter("bias_ih_l0")[32:64] += bias
    plain = plain.bfloat16()
    parallel = ps.parallelize(plain, ps.MultipleShooting(chunk_length=32))
    x, w = torch.randn(2, 512, 16, dtype=torch.bfloat16), torch.randn(2, 512, 32)

    def run(module):
        given = x.to(module.weight_ih_l0.dtype).requires_grad_()
        y = module(given)[0]
        return [y.detach(), *torch.autograd.grad((y * w.to(y.dtype)).sum(), [given, *module.parameters()])]

    exact = run(copy.deepcopy(plain).double())
    off = lambda found: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
    most = off(run(plain))
    for _ in range(8):
        assert off(run(parallel)) <= 2 * most
    assert max(parallel.info[0].passes, parallel.info[0].backward_passes) <= (3 if bias else 2)


def test_chunks_hand_states_on_and_gradients_back():
    """The order is a permutation, and handing back is the transpose of handing on."""
    chunks = cut((9, 4, 1), 4, True, True, torch.device("cpu"))
    assert chunks.sizes.tolist() == [4, 4, 4, 1, 1] and chunks.count == 3
    assert torch.equal(chunks.order[chunks.inverse], torch.arange(14))
    ends, initial, starts, final = (torch.randn(n, 2) for n in (5, 3, 5, 3))
    forward = (chunks.hand_on([ends], [initial])[0] * starts).sum() + (ends[chunks.last] * final).sum()
    back = chunks.hand_back([starts], [final])[0]
    assert torch.allclose(forward, (back * ends).sum() + (starts[chunks.first] * initial).sum())


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize(
    "options", [{}, OPTIONS["stack"], {"proj_size": 2, "num_layers": 2}], ids=["plain", "stack", "projected"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error:RNN module weights")
class TestOnAGPU:
    pytestmark = on_gpu

    def made(self, kind, options, dtype):
        if "proj_size" in options and kind != "lstm":
            pytest.skip("an LSTM's option")
        return KINDS[kind](3, 6, **options).to("cuda", dtype)

    @pytest.mark.parametrize("time", [160, 300])
    def test_agrees_with_cudnn(self, kind, options, time):
        plain = self.made(kind, options, torch.float64)
        x = torch.randn(time, 2, 3, dtype=torch.float64, device="cuda", requires_grad=True)
        for solver in (CHUNKS, ps.MultipleShooting(chunk_length=80), None):
            assert_same(plain, ps.parallelize(plain, solver), x, bound=1e-9)

    def test_packed_sequences(self, kind, options):
        plain = self.made(kind, options, torch.float64)
        packed = pack_sequence([torch.randn(n, 3, dtype=torch.float64, device="cuda") for n in (50, 33, 33, 16, 1)])
        packed = packed._replace(data=packed.data.requires_grad_())
        assert_same(plain, ps.parallelize(plain, CHUNKS), packed, bound=1e-9)

    def test_autocast_and_half_precision(self, kind, options):
        plain = self.made(kind, options, torch.float32)
        parallel = ps.parallelize(plain, CHUNKS)
        x = torch.randn(128, 2, 3, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            y, wanted = tensors(parallel(x)), tensors(plain(x))
        assert all(a.dtype == b.dtype and (a - b).abs().max() < 0.03 for a, b in zip(y, wanted, strict=True))
        y[0].float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in plain.parameters())
        y = parallel.bfloat16()(x.bfloat16())[0]
        assert y.dtype == torch.bfloat16 and (y - wanted[0]).abs().max() < 0.03

    def test_a_graph_can_be_captured(self, kind, options):
        """Of the plain module, after a call on the capturing stream as PyTorch asks for: cuDNN allocates in the first one."""
        plain = self.made(kind, options, torch.float32)
        parallel, x = ps.parallelize(plain, CHUNKS), torch.randn(128, 2, 3, device="cuda")
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad():
            with torch.cuda.stream(stream):
                wanted = plain(x)[0]
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                y = parallel(x)[0]
            graph.replay()
        torch.cuda.synchronize()
        assert (y - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("way", ["jvp", "dual numbers"])
def test_forward_mode_runs_the_module_itself(way):
    module = torch.nn.GRU(3, 4, batch_first=True).double()
    over = ps.parallelize(module, ps.MultipleShooting(8))
    for p in module.parameters():
        p.requires_grad_(False)
    x, t = torch.randn(2, 1, 32, 3, dtype=torch.float64)

    def derivative(m):
        if way == "jvp":
            return torch.func.jvp(lambda x: m(x)[0], (x,), (t,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, t)
            return torch.autograd.forward_ad.unpack_dual(m(dual)[0]).tangent

    torch.testing.assert_close(derivative(over), derivative(module), rtol=1e-12, atol=0.0)
