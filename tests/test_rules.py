"""Every misuse: the right exception, and a message that names the argument, what came, what was expected and what to do."""

import inspect
import re

import pytest
import torch

import parashoot as ps
from oracle import CELLS, ONE_OF_EACH, random_problem
from parashoot.plan import make_plan

GRU, LSTM, HEADS, DENSE = CELLS["gru"], CELLS["lstm"], CELLS["headgru"], CELLS["elman"]
zeros = torch.zeros


def arguments(cell=GRU, dtype=torch.float32) -> dict:
    x, params, h0 = random_problem(cell, 2, 5, 8, dtype=dtype)
    return {"cell": cell, "x": x, "params": tuple(params), "h0": h0}


def assert_refused(error, parts, **changed):
    """`ps.scan` with some arguments changed raises exactly `error`, and every part is in its message."""
    call: dict = {**arguments(changed.pop("on", GRU)), **changed}
    with pytest.raises(error) as raised:
        ps.scan(**call)
    assert type(raised.value) is error
    for part in parts:
        assert part in str(raised.value), f"{part!r} is missing in: {raised.value}"


SHAPE = "a tensor of shape "
WRONG_VALUES = {
    "x of rank 3": ({"x": zeros(2, 5, 8)}, ["x: got", SHAPE + "(2, 5, 8)", "(B, T, G, C) with G = 3", "z, r, c"]),
    "x of rank 6": ({"x": zeros(2, 5, 3, 8, 1, 1)}, ["x: got", SHAPE + "(2, 5, 3, 8, 1, 1)", "(B, T, G, C)"]),
    "too few inputs": ({"x": zeros(2, 5, 2, 8)}, ["x: got", SHAPE + "(2, 5, 2, 8)", "G = 3", "cell 'gru'"]),
    "one input, no axis for it": ({"on": DENSE, "x": zeros(2, 5, 8)}, ["x: got", "G = 1", "x.unsqueeze(2)"]),
    "no steps": ({"x": zeros(2, 0, 3, 8)}, ["x: got", "(2, 0, 3, 8)", "one step (T >= 1)"]),
    "no sequences": ({"x": zeros(0, 5, 3, 8), "h0": None}, ["x: got", "(0, 5, 3, 8)", "at least one sequence"]),
    "no channels": ({"x": zeros(2, 5, 3, 0)}, ["x: got", "(2, 5, 3, 0)", "one channel"]),
    "heads do not divide": ({"on": HEADS, "x": zeros(2, 5, 3, 6)}, ["x: got", "(2, 5, 3, 6)", "head width 4", "'headgru'"]),
    "integer x": ({"x": zeros(2, 5, 3, 8, dtype=torch.int64)}, ["x: got", "torch.int64", "floating", "float32", "x.float()"]),
    "bool x": ({"x": zeros(2, 5, 3, 8, dtype=torch.bool)}, ["x: got", "torch.bool", "bfloat16"]),
    "complex x": ({"x": zeros(2, 5, 3, 8, dtype=torch.complex64)}, ["x: got", "torch.complex64", "floating"]),
    "float8 x": ({"x": zeros(2, 5, 3, 8).to(torch.float8_e4m3fn)}, ["x: got", "torch.float8_e4m3fn", "floating"]),
    "no parameters": ({"params": None}, ["params: got None", "3 parameter(s) a_z, a_r, a_c", "(3, 8)"]),
    "too few parameters": ({"params": (zeros(8), zeros(8))}, ["params: got 2 tensors", "expected 3", "a_z, a_r, a_c"]),
    "stacked, of other sizes": ({"params": zeros(3, 7)}, ["params: got", SHAPE + "(3, 7)", "(P, C) = (3, 8)"]),
    "stacked, of another count": ({"params": zeros(2, 8)}, ["params: got", SHAPE + "(2, 8)", "(3, 8)"]),
    "one of another size": ({"params": (zeros(8), zeros(7), zeros(8))}, ["params: 'a_r'", SHAPE + "(7,)", "shape (8,)"]),
    "a matrix for a vector": ({"params": (zeros(8), zeros(8), zeros(8, 8))}, ["params: 'a_c'", "(8, 8)", "shape (8,)"]),
    "heads of another width": ({"on": HEADS, "params": (zeros(4, 2, 2),) * 3}, ["params: 'R_z'", "(4, 2, 2)", "(2, 4, 4)"]),
    "dense of another size": ({"on": DENSE, "params": (zeros(7, 8),)}, ["params: 'W'", "(7, 8)", "(8, 8)"]),
    "parameters for none": ({"on": CELLS["mingru"], "params": zeros(1, 8)}, ["params: got", "expected None", "'mingru' has no"]),
    "parameters of another dtype": ({"params": zeros(3, 8).double()}, ["params: got", "torch.float64", "torch.float32"]),
    "half parameters": ({"params": zeros(3, 8).half()}, ["params: got", "torch.float16", "the dtype of x (torch.float32)"]),
    "integer parameter": ({"params": (zeros(8), zeros(8).int(), zeros(8))}, ["params: 'a_r'", "torch.int32", "torch.float32"]),
    "h0 of rank 2": ({"h0": zeros(2, 8)}, ["h0: got", SHAPE + "(2, 8)", "(B, S, C) = (2, 1, 8)", "'h'"]),
    "h0 of too few slots": ({"on": LSTM, "h0": zeros(2, 1, 8)}, ["h0: got", "(2, 1, 8)", "(2, 2, 8)", "('c', 'h')"]),
    "h0 of another batch": ({"h0": zeros(3, 1, 8)}, ["h0: got", "(3, 1, 8)", "(2, 1, 8)"]),
    "h0 to be broadcast": ({"h0": zeros(1, 1, 8)}, ["h0: got", "(1, 1, 8)", "(2, 1, 8)"]),
    "h0 of another dtype": ({"h0": zeros(2, 1, 8).double()}, ["h0: got", "torch.float64", "torch.float32"]),
    "float reset": ({"reset": zeros(2, 5)}, ["reset: got", "torch.float32", "a bool tensor of shape (B, T) = (2, 5)"]),
    "reset of another length": ({"reset": zeros(2, 4).bool()}, ["reset: got", "(2, 4)", "(B, T) = (2, 5)", "True where"]),
    "reset of rank 1": ({"reset": zeros(5).bool()}, ["reset: got", "(5,)", "(2, 5)"]),
    "params elsewhere": ({"params": zeros(3, 8, device="meta")}, ["params: got", "on meta", "the device of x, cpu"]),
    "one parameter elsewhere": ({"params": (zeros(8), zeros(8), zeros(8, device="meta"))}, ["params: 'a_c'", "meta", "cpu"]),
    "h0 elsewhere": ({"h0": zeros(2, 1, 8, device="meta")}, ["h0: got", "on meta", "the device of x, cpu"]),
    "reset elsewhere": ({"reset": zeros(2, 5, device="meta").bool()}, ["reset: got", "on meta", "the device of x, cpu"]),
}  # fmt: skip
WRONG_TYPES = {
    "a function for the cell": ({"cell": GRU.step}, ["cell: got function", "expected a cell", "@ps.cell"]),
    "a list for x": ({"x": [1.0]}, ["x: got list [1.0]", "a tensor (B, T, G, C)"]),
    "a dict for params": ({"params": {"a": 1}}, ["params: got dict", "a tensor (P, C) or a tuple of 3 tensors", "a_z, a_r, a_c"]),
    "a number among params": ({"params": (zeros(8), 1.0, zeros(8))}, ["params: 'a_r': got float 1.0", "expected a tensor"]),
    "a number for h0": ({"h0": 0.0}, ["h0: got float 0.0", "None or a tensor (2, 1, 8)"]),
    "a list for reset": ({"reset": [True]}, ["reset: got list [True]", "None or a bool tensor (B, T)"]),
    "a number for reverse": ({"reverse": 1}, ["reverse: got int 1", "True or False"]),
    "a string for return_states": ({"return_states": "all"}, ["return_states: got str 'all'", "True or False"]),
    "None for return_info": ({"return_info": None}, ["return_info: got NoneType None", "True or False"]),
    "a solver's class": ({"solver": ps.MultipleShooting}, ["solver: got", "MultipleShooting", "Pass a value, not a class"]),
    "a solver's function": ({"solver": ps.Newton}, ["solver: got function", "ps.Newton()", "not a class or a name"]),
    "a solver's name": ({"solver": "newton"}, ["solver: got str 'newton'", "ps.Sequential()", "not a class or a name"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_wrong_values(name):
    changed, parts = WRONG_VALUES[name]
    assert_refused(ps.ArgumentError, parts, **changed)


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types(name):
    changed, parts = WRONG_TYPES[name]
    assert_refused(ps.ArgumentTypeError, parts, **changed)


def test_errors_are_python_s_own_kinds():
    assert issubclass(ps.ArgumentError, ValueError) and issubclass(ps.ArgumentTypeError, TypeError)
    assert issubclass(ps.CellError, TypeError) and issubclass(ps.StructureError, ValueError)
    assert issubclass(ps.BackendError, ValueError)
    assert issubclass(ps.ConvergenceError, RuntimeError) and issubclass(ps.GradientError, RuntimeError)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_of_a_third_dtype_are_refused(dtype):
    other = torch.bfloat16 if dtype == torch.float16 else torch.float16
    call = arguments(dtype=dtype)
    for argument in ("params", "h0"):
        wrong = torch.stack(call["params"]) if argument == "params" else call["h0"]
        with pytest.raises(
            ps.ArgumentError, match=rf"{argument}: got .*{other}.*the dtype of x \({dtype}\) or torch.float32"
        ):
            ps.scan(**{**call, argument: wrong.to(other)})


OPTIONS = {
    "chunk_length": [0, -3, 2.5, "long", True, None], "tol": [-1e-6, float("inf"), float("nan"), "tight"],
    "max_iters": [0, -1, 2.0, True, "many"], "jacobian": ["full", None, 1], "backend": ["cuda", None, "Triton"],
}  # fmt: skip


@pytest.mark.parametrize(("option", "value"), [(o, v) for o, vs in OPTIONS.items() for v in vs])
def test_bad_solver_options(option, value):
    expected = {"chunk_length": "'auto' or an integer >= 1", "tol": "a finite number >= 0", "max_iters": "None or an integer >= 1",
                "jacobian": "one of .*exact.*diagonal.*zero", "backend": "one of .*auto.*torch.*triton"}[option]  # fmt: skip
    with pytest.raises(ps.ArgumentError, match=f"{option}: got {re.escape(repr(value))}; expected .*{expected}"):
        ps.MultipleShooting(**{option: value})


@pytest.mark.parametrize("structure", ONE_OF_EACH)
def test_a_missed_limit(structure):
    """The error carries the numbers; with one sweep more than chunks the same solver succeeds."""
    cell = ONE_OF_EACH[structure]
    call = arguments(cell)
    call["x"] = random_problem(cell, 2, 60, 8, dtype=torch.float32)[0]
    with pytest.raises(ps.ConvergenceError) as raised:
        ps.scan(**call, solver=ps.MultipleShooting(2, tol=1e-6, max_iters=1))
    error, message = raised.value, str(raised.value)
    assert (error.iterations, error.tolerance) == (1, 1e-6) and error.defect > 1e-6
    assert "max_iters=1" in message and "tol=1e-06" in message and f"{error.defect:.3g}" in message
    assert (
        "30 chunks" in message
        and "max_iters=None" in message
        and "chunk_length" in message
        and "ps.Sequential()" in message
    )
    info = ps.scan(**call, solver=ps.MultipleShooting(2, tol=1e-6, max_iters=30), return_info=True)[2]
    assert 1 < info.iterations <= 30 and info.defect <= 1e-6
    ps.scan(**call, solver=ps.MultipleShooting(60, max_iters=1))


# What a step may not do. Each is a function of (h, x); the message quotes the offending line.


def adds_in_place(h: ps.State, x: ps.Input):
    h += x
    return torch.tanh(h)


def writes_an_index(h: ps.State, x: ps.Input):
    h[...] = 0
    return torch.tanh(h + x)


def writes_out(h: ps.State, x: ps.Input):
    return torch.tanh(h + x, out=h)


def calls_underscore(h: ps.State, x: ps.Input):
    y = h + x
    return y.tanh_()


def asks_for_place(h: ps.State, x: ps.Input):
    y = h + x
    return torch.tanh(y.detach()) + torch.nn.functional.relu(y, True)


def calls_an_operator(h: ps.State, x: ps.Input):
    y = torch.tanh(h + x)
    return torch.ops.aten.add_.Tensor(y, 1.0)


def draws_noise(h: ps.State, x: ps.Input):
    return torch.tanh(h + x) + torch.rand_like(h)


def drops_out(h: ps.State, x: ps.Input):
    return torch.nn.functional.dropout(torch.tanh(h + x), 0.5)


def draws_bits(h: ps.State, x: ps.Input):
    return torch.tanh(h + x) * torch.bernoulli(torch.sigmoid(x))


def branches(h: ps.State, x: ps.Input):
    if h.sum() > 0:
        return torch.tanh(h + x)
    return h


def branches_on_all(h: ps.State, x: ps.Input):
    return x if bool((h > 0).all()) else h


def reads_an_item(h: ps.State, x: ps.Input):
    return h * x.flatten()[0].item()


def reads_a_list(h: ps.State, x: ps.Input):
    return h + sum(x.flatten().tolist())


def compares(h: ps.State, x: ps.Input):
    return h if torch.equal(h, x) else x


def returns_a_number(h: ps.State, x: ps.Input):
    return 0.5


def returns_nothing(h: ps.State, x: ps.Input):
    torch.tanh(h + x)


def returns_two(h: ps.State, x: ps.Input):
    return h, x


def sums_channels(h: ps.State, x: ps.Input):
    return torch.stack([h, x])


def cuts_channels(h: ps.State, x: ps.Input):
    return h[..., :2] + x[..., :2]


def changes_dtype(h: ps.State, x: ps.Input):
    return torch.tanh(h + x).half()


def compares_only(h: ps.State, x: ps.Input):
    return h > x


def fails(h: ps.State, x: ps.Input):
    return torch.tanh(h + x).no_such_method()  # type: ignore[attr-defined]


IN_PLACE, RANDOM, BRANCH = "writes in place", "is random", "branches on, or reads out, the value of a tensor"
STEPS = {
    adds_in_place: (IN_PLACE, "h += x", "h = h + u"), writes_an_index: (IN_PLACE, "h[...] = 0", "Return new tensors"),
    writes_out: (IN_PLACE, "out=h", "Return new tensors"), calls_underscore: (IN_PLACE, "y.tanh_()", "Return new tensors"),
    asks_for_place: (IN_PLACE, "relu(y, True)", "Return new tensors"),
    calls_an_operator: (IN_PLACE, "aten.add_.Tensor(y, 1.0)", "Return new tensors"),
    draws_noise: (RANDOM, "torch.rand_like(h)", "ps.Input"), drops_out: (RANDOM, "dropout(", "ps.Input"),
    draws_bits: (RANDOM, "torch.bernoulli", "ps.Input"), branches: (BRANCH, "if h.sum() > 0", "torch.where"),
    branches_on_all: (BRANCH, ".all()", "torch.where"), reads_an_item: (BRANCH, ".item()", "torch.where"),
    reads_a_list: (BRANCH, ".tolist()", "torch.where"), compares: (BRANCH, "torch.equal", "torch.where"),
    returns_a_number: ("returned float 0.5", "", "Return the 1 new state(s) ('h',)"),
    returns_nothing: ("returned NoneType None", "", "Return the 1 new state(s)"),
    returns_two: ("returned ['a tensor", "", "Return the 1 new state(s)"),
    sums_channels: ("state 'h' came back with shape (2, ", "", "Keep the shape"),
    cuts_channels: ("state 'h' came back with shape", "", "Keep the shape"),
    changes_dtype: ("state 'h' came back as torch.float16, was torch.float32", "", "Keep the dtype"),
    compares_only: ("state 'h' came back as torch.bool", "", "Keep the dtype"),
    fails: ("AttributeError: 'Tensor' object has no attribute 'no_such_method'", "", "headwise"),
}  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("structure", ["channelwise", "headwise", "dense"])
def test_what_a_step_may_not_do(step, structure):
    cell, (problem, code, remedy) = (
        ps.cell(step, structure=structure, width=4 if structure == "headwise" else None),
        STEPS[step],
    )
    held = zeros(2, 5, 1, 8), torch.ones(2, 1, 8)
    before = [v.clone() for v in held]
    with pytest.raises(ps.CellError) as raised:
        ps.scan(cell, held[0], None, held[1])
    message = str(raised.value)
    assert f"cell '{step.__name__}': " in message and problem in message
    assert remedy in message or (step is fails and structure != "channelwise")
    if code:
        lines, first = inspect.getsourcelines(step)
        offset = next(k for k, line in enumerate(lines) if code in line)
        assert f"{__file__}:{first + offset}: {lines[offset].strip()}" in message
    assert all(torch.equal(v, b) for v, b in zip(held, before, strict=True)), "the caller's tensors stay as they were"


@pytest.mark.parametrize("structure", ONE_OF_EACH)
def test_second_derivatives_are_refused(structure):
    call = arguments(ONE_OF_EACH[structure], torch.float64)
    call["x"].requires_grad_()
    y, _ = ps.scan(**call, solver=ps.MultipleShooting(2))
    (first,) = torch.autograd.grad(y.sin().sum(), call["x"], create_graph=True)
    with pytest.raises(
        ps.GradientError, match=r"differentiated twice; it provides first derivatives only.*cell.step in a loop"
    ):
        torch.autograd.grad(first.square().sum(), call["x"])


def test_a_backend_that_cannot_run_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    make_plan.cache_clear()
    with pytest.raises(ps.BackendError, match=r"backend: got 'triton'; .*TRITON_INTERPRET=1.*backend='auto'"):
        ps.scan(**arguments(), solver=ps.MultipleShooting(backend="triton"))
