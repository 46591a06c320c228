"""Passes replayed from a CUDA graph: the bits of passes that run as they are, and where no graph is made."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

pytest.importorskip("transformers")
from lm_models import TINY
from parashoot.errors import DivergedError
from parashoot.lm.captured import Captured, watched
from parashoot.lm.log import read_log
from parashoot.lm.processes import Processes
from parashoot.lm.train import Run, train
from parashoot.lm.train_config import TrainConfig
from parashoot.plan import MultipleShooting

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
ALONE = Processes(0, 1, torch.device("cuda"))
BASE = {"steps": 8, "batch_size": 4, "sequence_length": 40, "learning_rate": 3e-3, "statistics_every": 3}


@pytest.fixture
def captures(monkeypatch) -> list[Captured]:
    """Everything that was captured."""
    found, inner = [], Captured._capture

    def capture(self, batch):
        inner(self, batch)
        assert self.captured
        found.append(self)

    monkeypatch.setattr(Captured, "_capture", capture)
    return found


def trained(directory, model, on_start=None, **changes) -> tuple[Run, list[float]]:
    run = train(
        TrainConfig(TINY.replace(hidden_size=128, **model), **{**BASE, **changes}), directory, ALONE, on_start=on_start
    )
    return run, [line[k] for line in read_log(directory) for k in ("loss", "grad_norm")]


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ({"cell": "gru"}, {}),
        ({"cell": "gru"}, {"compile": True}),
        ({"cell": "lstm"}, {"compile": True, "micro_batch_size": 2}),
        ({"cell": "headgru"}, {"precision": "fp32"}),
    ],
)
def test_a_graph_trains_with_the_same_bits(tmp_path, captures, model, changes):
    found = []
    for graph in (False, True):
        run, log = trained(tmp_path / str(graph), model, cuda_graph=graph, **changes)
        assert captures == [run.captured] * graph
        assert run.captured is None or not run.captured.captured  # its memory is free again
        found.append((log, [p.detach().clone() for p in run.model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_model_that_waits_for_the_gpu_runs_as_it_is(tmp_path, captures):
    def arm(run: Run) -> None:
        for layer in run.model.recurrent_layers():
            layer.solver = MultipleShooting(8, backend="torch")  # looks at its defects after each sweep

    _, log = trained(tmp_path / "run", {"cell": "gru"}, arm)
    assert captures == []
    assert len(log) == 16 and all(map(math.isfinite, log))


def test_numbers_that_are_not_finite_are_found_behind_a_graph(tmp_path):
    def arm(run: Run) -> None:
        draw = run.windows.draw

        def drawing(*arguments):
            if run.step == 6:
                run.model.model.layers[1].mlp.down_proj.weight.data.fill_(math.nan)
            return draw(*arguments)

        run.windows.draw = drawing  # type: ignore[method-assign]

    with pytest.raises(DivergedError, match=r"at step 7, first in the output of model\.layers\.1\.mlp\.down_proj"):
        trained(tmp_path / "run", {"cell": "gru"}, arm)


def test_other_shapes_begin_again():
    weight = torch.full((3,), 2.0, device="cuda", requires_grad=True)

    def compute(batch):
        weight.grad = None
        loss = torch.stack([(weight * ids).sum() for ids, _ in batch]).sum()
        loss.backward()
        return loss.detach()

    run = Captured(compute, lambda: setattr(weight, "grad", None))
    seen = []
    for n in (2, 2, 2, 2, 5, 5, 5, 5, 2):
        ids = torch.rand(n, 3, device="cuda")
        torch.testing.assert_close(run([(ids, None)]), 2 * ids.sum())
        torch.testing.assert_close(weight.grad, ids.sum(0))
        seen.append(run.captured)
    assert seen == [False, False, True, True, False, False, True, True, False]


def test_what_waits_is_noticed_and_other_warnings_are_passed_on():
    x = torch.ones((), device="cuda")
    assert watched(lambda: x + 1)[1] is False
    assert watched(lambda: x * x.item())[1] is True
    squares = torch.ones(2, device="cuda", requires_grad=True)
    squares.register_hook(lambda grad: grad * float(grad.sum()))  # waits in the thread of autograd

    def backward():
        squares.sum().backward()
        return x

    assert watched(backward)[1] is True
    assert torch.cuda.get_sync_debug_mode() == 0

    def warns():
        warnings.warn("something else", stacklevel=1)
        return x

    with pytest.warns(UserWarning, match="something else"):
        watched(warns)
