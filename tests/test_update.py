"""Where a training begins and how it goes on: weights drawn part by part, and results that are read late."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.profiler import profile

pytest.importorskip("transformers")
from torch.testing._internal.distributed.fake_pg import FakeStore

from lm_models import TINY
from parashoot.errors import DivergedError
from parashoot.lm import ParaRNNForCausalLM, checkpoint
from parashoot.lm.data import Windows, open_data
from parashoot.lm.log import read_log
from parashoot.lm.models import build_model, materialized
from parashoot.lm.order import mix
from parashoot.lm.processes import Processes, place
from parashoot.lm.train import Run, train
from parashoot.lm.train_config import TrainConfig
from parashoot.lm.update import Late

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
PLAIN = {"bf16": False, "compiled": False, "checkpointed": False}


@contextlib.contextmanager
def one_of(size: int, rank: int) -> Iterator[Processes]:
    """Process `rank` of `size` whose others do not exist: enough for what needs no communication."""
    if size > 1:
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield Processes(rank, size, CPU)
    finally:
        if size > 1:
            dist.destroy_process_group()


def shares(config, size: int, seed: int | None = 7) -> list[dict[str, torch.Tensor]]:
    """What each of `size` processes holds after `place`."""
    found = []
    for rank in range(size):
        with one_of(size, rank) as group:
            model = build_model(config)
            place(model, group, seed=seed, **PLAIN)
            local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
            found.append({n: p.detach().clone() for n, p in local.items()})
    return found


def drawn_directly(config, seed: int) -> ParaRNNForCausalLM:
    """Built with storage from the beginning, the parts drawn with the generator seeded for each."""
    model = ParaRNNForCausalLM(config)
    rest = [model, model.model, model.model.embed_tokens, model.model.layers, model.model.norm, model.lm_head]
    for number, part in enumerate([*(list(block.modules()) for block in model.model.layers), rest]):
        torch.manual_seed(mix(seed, number))
        for module in part[::-1]:
            model._init_weights(module)
    return model


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"cell": "headgru"}, {"tie_word_embeddings": True}])
def test_weights_do_not_depend_on_the_number_of_processes_or_on_where_they_were_built(size, changes):
    config = TINY.replace(**changes)
    expected = dict(drawn_directly(config, 7).named_parameters())
    parts = shares(config, size)
    assert parts[0].keys() == expected.keys()
    for name, whole in expected.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), whole), name


@pytest.mark.parametrize("cell", ["gru", "lstm", "slstm", "headgru"])
def test_every_number_of_a_model_is_drawn(cell, monkeypatch):
    empty = torch.nn.Module.to_empty

    def poisoned(self, **options):
        empty(self, **options)
        for t in (*self.parameters(recurse=False), *self.buffers(recurse=False)):
            if not t.is_meta and t.is_floating_point():
                t.data.fill_(math.nan)
        return self

    monkeypatch.setattr(torch.nn.Module, "to_empty", poisoned)
    model = build_model(TINY.replace(cell=cell))
    state = torch.get_rng_state()
    list(materialized(model, CPU, 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, t in (*model.named_parameters(), *model.named_buffers()) if not bool(t.isfinite().all())] == []
    list(materialized(model, CPU, None))
    assert all(bool(p.isnan().all()) for p in model.parameters())  # nothing is drawn for what will be loaded


@pytest.mark.parametrize("size", [1, 4])
def test_a_process_never_holds_more_than_its_share_and_one_part(size):
    config = TINY.replace(hidden_size=256, num_heads=4, num_hidden_layers=12, intermediate_size=512)
    model = build_model(config)
    whole = sum(p.numel() for p in model.parameters()) * 4
    block = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    with one_of(size, 0) as group, profile(profile_memory=True) as profiler:
        place(model, group, seed=0, **PLAIN)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, held)
    assert whole / size <= held <= 1.02 * whole / size
    assert peak <= 1.02 * whole / size + 1.1 * block


def config(**changes) -> TrainConfig:
    base = {"model": TINY, "steps": 6, "batch_size": 2, "sequence_length": 24, "learning_rate": 3e-3}
    return TrainConfig(**{**base, **changes})


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in run.model.state_dict().items()}


def test_results_are_read_while_the_next_step_runs_and_before_a_checkpoint(tmp_path, monkeypatch):
    happened: list[str] = []

    def noting(kind, name: str):
        inner = getattr(kind, name)

        def noted(*arguments):
            happened.append(name)
            return inner(*arguments)

        monkeypatch.setattr(kind, name, noted)

    noting(Run, "update")
    noting(Late, "read")
    train(config(checkpoint_every=4), tmp_path / "run", ALONE)
    assert happened == [
        "update",
        "update",
        "read",
        "update",
        "read",
        "update",
        "read",
        "read",
        "update",
        "update",
        "read",
        "read",
    ]
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_what_is_not_finite_stops_the_run_before_the_weights_change_though_read_late(tmp_path, where):
    settings, seen = config(checkpoint_every=2), []
    windows = Windows(open_data(None).split("train"), 24, settings.seed)
    third = [windows.draw(2)[0] for _ in range(3)][2]

    def arm(run: Run) -> None:
        def spoil(module, inputs, output):
            if torch.equal(inputs[0], third) and where == "forward":
                return output * math.nan
            if torch.equal(inputs[0], third) and output.requires_grad:
                output.register_hook(lambda grad: grad * math.inf)

        seen.append(run)
        run.model.model.embed_tokens.register_forward_hook(spoil)

    words = {
        "forward": r"loss is nan at step 3, first in the output of model\.embed_tokens; the checkpoint .*step-000002 is",
        "backward": r"gradient norm is \w+ at step 3, first in the gradient of model\.embed_tokens\.weight; .*step-000002",
    }
    with pytest.raises(DivergedError, match=words[where]):
        train(settings, tmp_path / "run", ALONE, on_start=arm)
    (run,) = seen
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2]
    saved = checkpoint.load_model(tmp_path / "run").state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in weights(run).items())


def test_after_a_signal_all_steps_are_logged_and_saved(tmp_path):
    def arm(run: Run) -> None:
        draw = run.windows.draw

        def drawing(*arguments):
            if run.step == 3:
                signal.raise_signal(signal.SIGTERM)
            return draw(*arguments)

        run.windows.draw = drawing  # type: ignore[method-assign]

    run = train(config(steps=50), tmp_path / "run", ALONE, on_start=arm)
    assert run.interrupted
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4]
    assert checkpoint.facts(checkpoint.find(tmp_path / "run"))["step"] == run.step == 4
