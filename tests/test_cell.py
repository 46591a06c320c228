"""`@ps.cell`: roles from the signature, options, errors, copying and pickling, and what a step may read besides its arguments."""

import copy
import dataclasses
import importlib
import math
import pickle
import sys
import types

import pytest
import torch

import future_cell
import parashoot as ps
from oracle import by_loop, loop, random_problem
from parashoot.trace import trace


def trace_of(cell, dtype=torch.float64):
    return trace(cell, dtype, torch.device("cpu"), (4,), ((4,),) * len(cell.params))


def assert_equals_loop(cell, **options):
    x, params, h0 = random_problem(cell, 2, 20, 4)
    y, _ = ps.scan(cell, x, tuple(params) or None, h0, solver=ps.MultipleShooting(6), **options)
    torch.testing.assert_close(y, loop(cell, x, params, h0)[:, :, cell.output], rtol=0, atol=1e-10)
    return y


def test_roles_follow_the_annotations():
    @ps.cell
    def mixed(c: ps.State, h: ps.State, x: ps.Input, u: ps.Input, w: ps.Param):
        """Two states."""
        return w * c + x, torch.tanh(h + u)

    assert (mixed.states, mixed.inputs, mixed.params) == (("c", "h"), ("x", "u"), ("w",))
    assert (mixed.name, mixed.structure, mixed.width, mixed.output) == ("mixed", "channelwise", None, 1)
    assert mixed.__doc__ == "Two states."
    arguments = [torch.full((3,), float(k)) for k in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(mixed(*arguments), mixed.step(*arguments), strict=True))
    assert "mixed" in repr(mixed) and "'c', 'h'" in repr(mixed) and "channelwise" in repr(mixed)


def test_output_names_the_state_that_y_carries():
    def two(c: ps.State, h: ps.State, x: ps.Input):
        return torch.tanh(c + x), torch.sigmoid(h - x)

    assert ps.cell(two).output == 1 and ps.cell(output="h")(two).output == 1 and ps.cell(output="c")(two).output == 0
    first, second = assert_equals_loop(ps.cell(output="c")(two)), assert_equals_loop(ps.cell(two))
    assert not torch.allclose(first, second)
    with pytest.raises(ps.ArgumentError, match=r"output: got 'z'; expected the name of a state, one of \('c', 'h'\)"):
        ps.cell(output="z")(two)


def no_role(h: ps.State, x: ps.Input, w):
    return h


def plain_tensor(h: ps.State, x: torch.Tensor):
    return h


def with_default(h: ps.State, x: ps.Input, w: ps.Param = torch.ones(1)):  # noqa: B008
    return h


def variadic(h: ps.State, *x: ps.Input):
    return h


def keyword_only(h: ps.State, *, x: ps.Input):
    return h


def wrong_order(x: ps.Input, h: ps.State):
    return h


def no_state(x: ps.Input):
    return x


def no_input(h: ps.State, w: ps.Param):
    return w * h


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (no_role, "argument 'w' has no role"), (plain_tensor, "argument 'x: torch.Tensor' has no role"),
        (with_default, "argument 'w: .* = tensor.*' has no role.*no default"), (variadic, r"argument '\*x: .*' has no role"),
        (keyword_only, "argument 'x: .*' has no role"), (wrong_order, r"argument order is \['x', 'h'\].*all ps.State first"),
        (no_state, "no argument is annotated ps.State"), (no_input, "no argument is annotated ps.Input"),
    ],
)  # fmt: skip
def test_a_signature_that_does_not_say_the_roles_is_refused(step, message):
    with pytest.raises(ps.CellError, match=f"cell '{step.__name__}': {message}") as raised:
        ps.cell(step)
    assert isinstance(raised.value, TypeError)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), torch.tanh, "step", int])
def test_only_functions_become_cells(thing):
    with pytest.raises(ps.CellError, match=f"got {type(thing).__name__}; expected a plain Python function"):
        ps.cell(thing)


@pytest.mark.parametrize(
    ("structure", "width"),
    [("headwise", None), ("channelwise", 4), ("dense", 4), ("headwise", 0), ("headwise", 2.0), ("headwise", "4")],
)
def test_width_belongs_to_headwise_cells(structure, width):
    with pytest.raises(ps.ArgumentError, match=f"width: got {width!r} with structure '{structure}'.*with n >= 1"):
        ps.cell(structure=structure, width=width)(future_cell.heads.step)


def test_an_unknown_structure_is_refused():
    with pytest.raises(ps.ArgumentError, match=r"structure: got 'diagonal'; expected one of .*channelwise.*dense"):
        ps.cell(structure="diagonal")(future_cell.heads.step)


def test_with_width():
    wide = future_cell.heads.with_width(4)
    assert (wide.width, wide.structure, wide.step) == (4, "headwise", future_cell.heads.step)
    assert wide.key != future_cell.heads.key
    assert_equals_loop(wide)
    with pytest.raises(
        ps.ArgumentError, match="cell 'postponed': got structure 'channelwise'; only headwise cells have a width"
    ):
        future_cell.postponed.with_width(4)
    with pytest.raises(ps.ArgumentError, match="width: got 0"):
        future_cell.heads.with_width(0)


def test_postponed_annotations():
    cell = future_cell.postponed
    assert (cell.states, cell.inputs, cell.params, cell.output) == (("c", "h"), ("x",), ("w",), 0)
    assert_equals_loop(cell)
    assert_equals_loop(future_cell.nested(0.5))


@pytest.mark.parametrize("cell", [future_cell.postponed, future_cell.heads, ps.cells.gru], ids=lambda c: c.name)
def test_copies_are_the_cell_itself(cell):
    assert pickle.loads(pickle.dumps(cell)) is cell
    assert copy.copy(cell) is cell and copy.deepcopy(cell) is cell
    assert copy.deepcopy({"cell": cell})["cell"] is cell


def test_a_cell_of_another_width_survives_pickling():
    wide = ps.cells.headgru.with_width(4)
    again = pickle.loads(pickle.dumps(wide))
    assert (again.width, again.step, again.output) == (4, wide.step, wide.output)
    assert copy.deepcopy(wide) is wide


def test_a_cell_that_cannot_be_found_again_is_not_pickled():
    with pytest.raises(TypeError, match=r"cell 'inner' cannot be pickled.*Define cells at module level"):
        pickle.dumps(future_cell.nested(0.5))


SCALE, TABLE, OPTIONS = 0.5, [0.1, 0.2], types.SimpleNamespace(gain=0.5)


@dataclasses.dataclass
class Settings:
    gain: float = 0.5


SETTINGS, KNOBS = Settings(), types.ModuleType("knobs")
vars(KNOBS)["gain"] = 0.5


class Constants:
    gain = 0.5
    hidden = torch.tensor(0.5)

    @staticmethod
    def squash(v):
        return torch.tanh(0.5 * v)


def sine(v):
    return torch.sin(v)


def keyword(h, *, gain=0.5):
    return torch.tanh(gain * h)


def helper(h):
    return SCALE * torch.tanh(h)


@ps.cell
def reads_a_global(h: ps.State, x: ps.Input):
    return torch.tanh(SCALE * h + x)


@ps.cell
def reads_through_a_helper(h: ps.State, x: ps.Input):
    return helper(h) + x


@ps.cell
def reads_a_list(h: ps.State, x: ps.Input):
    return sum(w * torch.tanh(h + k) for k, w in enumerate(TABLE)) + x


@ps.cell
def reads_a_namespace(h: ps.State, x: ps.Input):
    return OPTIONS.gain * h + x


@ps.cell
def reads_a_dataclass(h: ps.State, x: ps.Input):
    return SETTINGS.gain * h + x


@ps.cell
def reads_a_class(h: ps.State, x: ps.Input):
    return torch.tanh(Constants.gain * h + x)


@ps.cell
def reads_a_static_method(h: ps.State, x: ps.Input):
    return Constants.squash(h) + x


@ps.cell
def reads_a_keyword_default(h: ps.State, x: ps.Input):
    return keyword(h) + x


@ps.cell
def reads_in_a_lambda(h: ps.State, x: ps.Input):
    return (lambda v: KNOBS.gain * v)(h) + x


def changes(monkeypatch):
    return {
        reads_a_global: lambda: monkeypatch.setitem(globals(), "SCALE", -0.9),
        reads_through_a_helper: lambda: monkeypatch.setitem(globals(), "SCALE", -0.9),
        reads_a_list: lambda: monkeypatch.setitem(globals(), "TABLE", [0.1, -0.7]),
        reads_a_namespace: lambda: monkeypatch.setattr(OPTIONS, "gain", -0.9),
        reads_a_dataclass: lambda: monkeypatch.setattr(SETTINGS, "gain", -0.9),
        reads_a_class: lambda: monkeypatch.setattr(Constants, "gain", -0.9),
        reads_a_static_method: lambda: monkeypatch.setattr(Constants, "squash", staticmethod(sine)),
        reads_a_keyword_default: lambda: monkeypatch.setattr(keyword, "__kwdefaults__", {"gain": -0.9}),
        reads_in_a_lambda: lambda: monkeypatch.setattr(KNOBS, "gain", -0.9),
    }


READERS = [
    reads_a_global, reads_through_a_helper, reads_a_list, reads_a_namespace, reads_a_dataclass, reads_a_class,
    reads_a_static_method, reads_a_keyword_default, reads_in_a_lambda,
]  # fmt: skip
readers = pytest.mark.parametrize("cell", READERS, ids=lambda c: c.name)


@readers
def test_what_a_step_reads_may_change_between_scans(cell, monkeypatch):
    before, traced, mark = assert_equals_loop(cell), trace_of(cell), cell.fingerprint()
    assert trace_of(cell) is traced and cell.fingerprint() == mark, "unchanged: the same trace"
    changes(monkeypatch)[cell]()
    assert cell.fingerprint() != mark
    assert trace_of(cell).digest != traced.digest
    assert not torch.allclose(assert_equals_loop(cell), before)


@readers
def test_a_change_between_forward_and_backward_is_refused(cell, monkeypatch):
    x, _, h0 = random_problem(cell, 1, 12, 4)
    y, _ = ps.scan(cell, x.requires_grad_(), None, h0, solver=ps.MultipleShooting(4))
    changes(monkeypatch)[cell]()
    with pytest.raises(ps.GradientError, match=f"cell '{cell.name}' changed between forward and backward"):
        y.sum().backward()


def test_a_closure_that_changes_gives_a_new_trace():
    scale, other = 0.5, math.pi

    @ps.cell
    def closed(h: ps.State, x: ps.Input):
        return torch.tanh(scale * h + other * x)

    before, digest = assert_equals_loop(closed), trace_of(closed).digest
    scale = -0.8
    assert trace_of(closed).digest != digest
    assert not torch.allclose(assert_equals_loop(closed), before)
    scale = 0.5
    assert trace_of(closed).digest == digest
    assert torch.equal(assert_equals_loop(closed), before)


CAPTURED = torch.tensor(2.0)


def test_a_tensor_of_a_class_is_refused():
    @ps.cell
    def hidden(h: ps.State, x: ps.Input):
        return torch.tanh(Constants.hidden * h + x)

    with pytest.raises(ps.CellError, match=r"the step reads the tensor 'Constants\.hidden' from outside its arguments"):
        ps.scan(hidden, torch.randn(1, 8, 1, 3))


def test_a_tensor_from_outside_is_refused():
    inside = torch.ones(4)

    @ps.cell
    def global_tensor(h: ps.State, x: ps.Input):
        return CAPTURED * h + x

    @ps.cell
    def closed_tensor(h: ps.State, x: ps.Input):
        return inside * h + x

    @ps.cell
    def tensor_in_a_helper(h: ps.State, x: ps.Input):
        return (lambda v: CAPTURED * v)(h) + x

    for cell, name in ((global_tensor, "CAPTURED"), (closed_tensor, "inside"), (tensor_in_a_helper, "CAPTURED")):
        with pytest.raises(
            ps.CellError, match=f"cell '{cell.name}': the step reads the tensor '{name}' from outside.*ps.Param"
        ):
            ps.scan(cell, torch.zeros(1, 3, 1, 4))


def test_an_object_whose_changes_cannot_be_noticed_is_refused():
    module = torch.nn.PReLU()

    class Holder:
        gain = 0.5

    holder = Holder()

    @ps.cell
    def reads_a_module(h: ps.State, x: ps.Input):
        return module.weight * h + x

    @ps.cell
    def reads_an_object(h: ps.State, x: ps.Input):
        return holder.gain * h + x

    for cell, name in ((reads_a_module, "module"), (reads_an_object, "holder")):
        with pytest.raises(ps.CellError, match=f"the step reads '{name}'.*from outside its arguments"):
            ps.scan(cell, torch.zeros(1, 3, 1, 4))


def test_cells_of_the_same_function_and_name_do_not_share_a_trace():
    weak, strong = future_cell.nested(0.1), future_cell.nested(0.9)
    assert weak.key != strong.key
    assert not torch.allclose(assert_equals_loop(weak), assert_equals_loop(strong))


# What changes a step from elsewhere

SLOPE = 1.0


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, *grads):
        (v,) = ctx.saved_tensors
        return grads[0] / (1 + (SLOPE * v).square())


class Leak:
    rate = 0.5

    @classmethod
    def kept(cls):
        return cls.rate


def slowed(h):
    return slowed.rate * h


slowed.rate = 0.5


@ps.cell
def spiking(h: ps.State, x: ps.Input):
    return 0.9 * h * (1 - Spike.apply(h - 1)) + x


@ps.cell
def by_class_method(h: ps.State, x: ps.Input):
    return Leak.kept() * h + x


@ps.cell
def by_attribute(h: ps.State, x: ps.Input):
    return slowed(h) + x


@ps.cell
def by_import(h: ps.State, x: ps.Input):
    from future_cell import RATE

    return RATE * h + x


@pytest.mark.parametrize(
    ("cell", "owner", "name"),
    [(spiking, sys.modules[__name__], "SLOPE"), (by_class_method, Leak, "rate"), (by_attribute, slowed, "rate"),
     (by_import, importlib.import_module("future_cell"), "RATE")],
    ids=["function", "class", "attribute", "import"],
)  # fmt: skip
def test_what_a_step_reads_through_others_is_noticed(cell, owner, name, monkeypatch):
    x, found = torch.randn(1, 40, 1, 3, dtype=torch.float64), []
    for value in (0.5, 4.0 if cell is spiking else 0.9):
        monkeypatch.setattr(owner, name, value)
        grads = []
        for run in (
            lambda x: ps.scan(cell, x, solver=ps.MultipleShooting(8))[0],
            lambda x: by_loop(cell)(x, (), x.new_zeros(1, 1, 3))[0],
        ):
            leaf = x.clone().requires_grad_()
            grads.append(torch.autograd.grad(run(leaf).square().sum(), leaf)[0])
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
        found.append(grads[0])
    assert not torch.equal(*found)


def test_what_could_read_anything_is_refused():
    @ps.cell
    def hidden(h: ps.State, x: ps.Input):
        return eval("SLOPE") * h + x

    with pytest.raises(ps.CellError, match="calls eval"):
        ps.scan(hidden, torch.zeros(1, 2, 1, 3))

    @ps.cell
    def absent(h: ps.State, x: ps.Input):
        from no_such_module import RATE  # type: ignore[import-not-found]

        return RATE * h + x

    with pytest.raises(ps.CellError, match="imports 'no_such_module'"):
        ps.scan(absent, torch.zeros(1, 2, 1, 3))
