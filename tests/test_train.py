"""Training: the recipe, and runs that are interrupted, killed, resumed, spread over processes or broken by bad input."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from parashoot import scan as library_scan
from parashoot.cli import main
from parashoot.errors import ArgumentError, CheckpointError, DivergedError
from parashoot.lm import ParaRNNConfig, ParaRNNForCausalLM, checkpoint
from parashoot.lm.data import Windows
from parashoot.lm.interrupt import Interrupt
from parashoot.lm.log import read_log
from parashoot.lm.models import build_model, materialized, parameter_groups
from parashoot.lm.prepare import prepare
from parashoot.lm.presets import DEMO
from parashoot.lm.processes import Processes, place, precision
from parashoot.lm.sources import by_content, text_files
from parashoot.lm.tokenizer import Bytes
from parashoot.lm.train import Run, train
from parashoot.lm.train_config import TrainConfig
from parashoot.lm.watch import first_non_finite, solver_statistics

TINY = ParaRNNConfig(vocab_size=256, hidden_size=16, num_hidden_layers=2, num_heads=2, intermediate_size=32)
ALONE = Processes(0, 1, torch.device("cpu"))
SRC = Path(__file__).parents[1] / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Many short documents, so that windows hold resets."""
    where = tmp_path_factory.mktemp("data") / "sums"
    texts = [f"{a} and {b} are {a + b}; " for a in range(40) for b in range(40)]
    prepare(where, lambda: by_content(texts, 0.1, 0.1), Bytes())
    return str(where)


def run_config(data: str, **changes) -> TrainConfig:
    base = {"model": TINY, "steps": 6, "batch_size": 2, "sequence_length": 24, "learning_rate": 3e-3, "data": data}
    return TrainConfig(**{**base, **changes})


def losses(directory: Path) -> list[float]:
    lines = read_log(directory)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def new_model(seed: int) -> ParaRNNForCausalLM:
    model = build_model(TINY)
    list(materialized(model, torch.device("cpu"), seed))
    return model


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in run.model.state_dict().items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


# The recipe


def test_a_tiny_model_learns(data, tmp_path):
    train(run_config(data, steps=60, batch_size=4, learning_rate=1e-2), tmp_path / "run", ALONE)
    found = losses(tmp_path / "run")
    assert sum(found[-5:]) / 5 < 0.6 * found[0]


def test_only_matrices_decay():
    model = ParaRNNForCausalLM(TINY.replace(cell="headgru"))
    decayed, kept = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = {names[id(p)] for p in decayed}, {names[id(p)] for p in kept}
    matrices = {"mixer.rnn.weight_ih_l0", "mixer.rnn.weight_hh_l0_R_z", "mixer.in_proj.weight", "mlp.down_proj.weight"}
    vectors = {"mixer.conv.weight", "mixer.rnn.bias_l0", "residual_scale", "mixer_norm.weight"}
    assert {n.split(".", 3)[3] for n in decayed if ".0." in n} >= matrices
    assert {n.split(".", 3)[3] for n in kept if ".0." in n} >= vectors
    assert len(decayed) + len(kept) == len(names)


def test_decay_does_not_depend_on_the_learning_rate(data, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainConfig, "learning_rate_at", lambda self, step: self.learning_rate)
    shrunk = []
    for rate in (1e-9, 1e-8):  # too low to learn anything
        config = run_config(data, steps=3, learning_rate=rate, weight_decay=0.1, warmup=0.0)
        before = new_model(config.seed).state_dict()
        after = weights(train(config, tmp_path / f"{rate}", ALONE))
        name = next(n for n in after if n.endswith("in_proj.weight"))
        shrunk.append((after[name] / before[name]).median().item())
    assert shrunk == pytest.approx([0.9**3] * 2, rel=1e-5)


def test_the_learning_rate_rises_and_falls_to_zero(data):
    config = run_config(data, steps=100, warmup=0.1, learning_rate=1.0)
    rates = [config.learning_rate_at(k) for k in range(101)]
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


def test_a_step_is_the_written_out_one(data, tmp_path):
    """Loss, z-loss, clipping and AdamW, each as its formula says, from the same windows."""
    config = run_config(data, steps=1, z_loss=0.1, grad_clip=0.05, weight_decay=0.01, warmup=1.0)
    run = train(config, tmp_path / "run", ALONE)
    model = new_model(config.seed)
    ids, reset = Windows(run.data.split("train"), 24, config.seed).draw(2)
    assert reset is not None and bool(reset.any())
    logits = model(ids, reset=reset).logits[:, :-1]
    logp = logits - logits.exp().sum(-1, keepdim=True).log()
    loss = -logp.gather(-1, ids[:, 1:, None]).mean()
    square = logits.exp().sum(-1).log().square().mean()
    (loss + 0.1 * square).backward()
    facts = read_log(tmp_path / "run")[0]
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    assert facts["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert facts["log_partition_squared"] == pytest.approx(square.item(), rel=1e-6)
    assert facts["grad_norm"] == pytest.approx(norm, rel=1e-5)
    name, p = next((n, p) for n, p in model.named_parameters() if n.endswith("in_proj.weight"))
    assert p.grad is not None
    g = p.grad * 0.05 / (norm + 1e-6)
    expected = p * (1 - 0.01) - config.learning_rate * g / (g.abs() + 1e-8)  # AdamW's first step
    torch.testing.assert_close(weights(run)[name], expected.detach(), rtol=1e-4, atol=1e-6)
    mine = dict(run.model.named_parameters())[name]
    torch.testing.assert_close(run.optimizer.state[mine]["exp_avg"], 0.1 * g, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"activation_checkpointing": True}])
def test_how_a_batch_is_computed_does_not_change_what(data, tmp_path, changes):
    config = run_config(data, steps=4, batch_size=4)
    train(config, tmp_path / "a", ALONE)
    train(replace(config, **changes), tmp_path / "b", ALONE)
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-6)


def test_solver_statistics_are_those_of_each_layer():
    model = ParaRNNForCausalLM(TINY)
    ids = torch.randint(0, 256, (2, 300))
    found = solver_statistics(model, ids, None)
    assert len(found) == 2
    for k, layer in enumerate(model.recurrent_layers()):
        x = input_of(layer, model, ids)
        info = library_scan(*layer.prepared(x), return_info=True)[2]
        assert found[k] == {"iterations": info.iterations, "iterations_mean": info.iterations_mean,
                            "defect": pytest.approx(info.defect, abs=1e-7)}  # fmt: skip
        assert "_scan" not in vars(layer)


def input_of(layer: torch.nn.Module, model: ParaRNNForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(ids)
    hook.remove()
    return seen[0]


def test_the_log_holds_the_statistics_and_tensorboard_the_same(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(run_config(data, steps=5, statistics_every=2, tensorboard=True), tmp_path / "run", ALONE)
    lines = read_log(tmp_path / "run")
    assert [len(line.get("solver", [])) for line in lines] == [2, 0, 2, 0, 2]
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.value for e in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    assert [e.step for e in board.Scalars("layer 1/iterations")] == [1, 3, 5]


# Interrupted and resumed


def test_signals_that_come_together_are_one(monkeypatch):
    # A shell starts background jobs with SIGINT ignored: what "as usual" means is set here.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.received
        monkeypatch.setattr("parashoot.lm.interrupt.TOGETHER", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_the_random_state_is_resumed(data, tmp_path):
    """No layer of ours draws while training; another model's dropout would."""
    config = run_config(data)

    def disturb(run: Run) -> None:
        torch.manual_seed(99)

    train(config, tmp_path / "run", ALONE, on_start=disturb)
    saved = torch.get_rng_state()
    train(config, tmp_path / "run", ALONE, resume=True)
    assert torch.equal(torch.get_rng_state(), saved)


def test_a_z_loss_has_one_place():
    with pytest.raises(ArgumentError, match=r"model\.z_loss: got 0\.001; expected 0"):
        replace(DEMO, model=TINY.replace(vocab_size=256, z_loss=1e-3))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(data, tmp_path, monkeypatch, number):
    config = run_config(data, checkpoint_every=4)
    straight = train(config, tmp_path / "straight", ALONE)
    with monkeypatch.context() as patch:
        draw, calls = Windows.draw, []

        def signalled(self, *arguments):
            calls.append(1)
            if len(calls) == 3:
                signal.raise_signal(number)
            return draw(self, *arguments)

        patch.setattr(Windows, "draw", signalled)
        stopped = train(config, tmp_path / "run", ALONE)
    assert stopped.interrupted
    assert stopped.step == 3
    torch.manual_seed(99)
    resumed = train(config, tmp_path / "run", ALONE, resume=True)
    assert not resumed.interrupted
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert same_bits(weights(resumed), weights(straight))


def test_a_run_killed_at_any_moment_continues_with_the_same_bits(data, tmp_path):
    config = run_config(data, steps=400, checkpoint_every=5)
    (tmp_path / "tiny.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "parashoot", "train", "tiny.json"]
    moments = random.Random(os.getpid())
    flags: list[str] = []
    for _ in range(2):
        before = len(read_log(tmp_path / "runs" / "tiny"))
        wait_for = before + moments.randrange(1, 25)
        process = subprocess.Popen(
            [*command, *flags], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while len(read_log(tmp_path / "runs" / "tiny")) < wait_for:
            assert process.poll() is None, process.communicate()[1].decode()
            assert time.monotonic() < deadline
            time.sleep(moments.random() * 0.01)
        process.kill()
        process.communicate()
        flags = ["--resume", "runs/tiny"]
    saved = (tmp_path / "runs" / "tiny" / checkpoint.LATEST).exists()  # or both died before that: then from the start
    reached = checkpoint.facts(checkpoint.find(tmp_path / "runs" / "tiny"))["step"] if saved else 0
    short = replace(config, steps=400)
    run = train_until(short, tmp_path / "runs" / "tiny", reached + 7, resume=True)
    straight = train_until(short, tmp_path / "straight", reached + 7)
    assert losses(tmp_path / "runs" / "tiny") == losses(tmp_path / "straight")
    assert same_bits(weights(run), weights(straight))


def train_until(config: TrainConfig, directory: Path, step: int, resume: bool = False) -> Run:
    """Train, and send SIGTERM to this process during that step."""

    def arm(run: Run) -> None:
        draw = run.windows.draw

        def drawing(*arguments):
            if run.step == step - 1:
                signal.raise_signal(signal.SIGTERM)
            return draw(*arguments)

        run.windows.draw = drawing  # type: ignore[method-assign]

    return train(config, directory, ALONE, resume=resume, on_start=arm)


def torchrun(count: int, *arguments: str, cwd: Path) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launcher, "-m", "parashoot", "train", *arguments, "--device", "cpu"]
    return subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_processes_equal_one_and_resume_as_one_or_two(data, tmp_path):
    """FSDP2 over Gloo: the same losses, checkpoints that either number of processes continues, SIGTERM agreed upon."""
    config = run_config(data, steps=400, batch_size=4, checkpoint_every=5)
    (tmp_path / "tiny.json").write_text(json.dumps(config.to_dict()))
    process = torchrun(2, "tiny.json", cwd=tmp_path)
    deadline = time.monotonic() + 100
    while len(read_log(tmp_path / "runs" / "tiny")) < 8:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=60)[0]
    assert "nothing is lost" in out, out
    reached = checkpoint.facts(checkpoint.find(tmp_path / "runs" / "tiny"))["step"]
    assert reached == len(losses(tmp_path / "runs" / "tiny")) < 400
    train_until(config, tmp_path / "straight", reached + 6)
    straight = losses(tmp_path / "straight")
    assert losses(tmp_path / "runs" / "tiny") == pytest.approx(straight[:reached], rel=1e-6)
    shutil.copytree(tmp_path / "runs" / "tiny", tmp_path / "one")
    run = train_until(config, tmp_path / "one", reached + 3, resume=True)
    assert losses(tmp_path / "one") == pytest.approx(straight[: reached + 3], rel=1e-6)
    # From one process back to two: to the end of a schedule that ends soon.
    ending = replace(config, steps=reached + 5)
    assert run.saved is not None
    facts = checkpoint.facts(run.saved) | {"config": ending.to_dict()}
    (run.saved / checkpoint.FACTS).write_text(json.dumps(facts))
    (tmp_path / "ending.json").write_text(json.dumps(ending.to_dict()))
    shutil.copytree(tmp_path / "one", tmp_path / "alone")
    process = torchrun(2, "ending.json", "--resume", "one", cwd=tmp_path)
    out = process.communicate(timeout=100)[0]
    assert process.returncode == 0, out
    train(ending, tmp_path / "alone", ALONE, resume=True)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "alone"), rel=1e-6)
    assert out.count("perplexity") == out.count("Trained") == 1


# Broken runs


def test_a_non_finite_loss_names_layer_and_step_and_keeps_the_checkpoint(data, tmp_path, monkeypatch):
    update = Run.update

    def poisoned(run, batch, rate):
        if run.step == 3:
            run.model.get_parameter("model.layers.1.mixer.norm.weight").data[5] = math.nan
        return update(run, batch, rate)

    monkeypatch.setattr(Run, "update", poisoned)
    words = r"loss is nan at step 4, first in the output of model\.layers\.1\.mixer\.norm; the checkpoint .*step-000002 is kept"
    with pytest.raises(DivergedError, match=words):
        train(run_config(data, checkpoint_every=2), tmp_path / "run", ALONE)
    model = checkpoint.load_model(tmp_path / "run")
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_non_finite_gradient_names_the_parameter(data, tmp_path):
    def arm(run: Run) -> None:
        p = run.model.get_parameter("model.layers.0.mlp.up_proj.weight")
        p.register_hook(lambda g: torch.full_like(g, math.inf))

    with pytest.raises(
        DivergedError, match=r"norm is inf at step 1, first in the gradient of model\.layers\.0\.mlp\.up_proj"
    ):
        train(run_config(data), tmp_path / "run", ALONE, on_start=arm)


def test_a_finite_model_has_no_first_non_finite_module():
    model = ParaRNNForCausalLM(TINY)
    assert first_non_finite(model, lambda: model(torch.zeros(1, 5, dtype=torch.int64))) is None


def test_a_full_disk_while_saving_loses_nothing(data, tmp_path):
    config = run_config(data, checkpoint_every=2)

    def fill(run: Run) -> None:  # after two checkpoints: files may no longer grow as large as a third needs
        draw = run.windows.draw

        def drawing(*arguments):
            if run.step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
            return draw(*arguments)

        run.windows.draw = drawing  # type: ignore[method-assign]

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"step 6 .*could not be written.*step-000004 is kept"):
            train(config, tmp_path / "run", ALONE, on_start=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["latest", "log.jsonl", "step-000002", "step-000004"]
    train(config, tmp_path / "run", ALONE, resume=True)
    train(config, tmp_path / "straight", ALONE)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_the_last_checkpoints_are_kept(data, tmp_path):
    train(run_config(data, checkpoint_every=1, keep_checkpoints=3), tmp_path / "run", ALONE)
    assert [p.name for p in checkpoint.steps(tmp_path / "run")] == ["step-000004", "step-000005", "step-000006"]
    assert checkpoint.find(tmp_path / "run").name == "step-000006"
    assert checkpoint.find(tmp_path / "run" / "step-000004").name == "step-000004"


def test_damaged_and_foreign_checkpoints_are_refused(data, tmp_path):
    config, where = run_config(data, checkpoint_every=3), tmp_path / "run"
    train(config, where, ALONE)
    part = next((where / "step-000006").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:999])
    for use in (checkpoint.load_model, lambda p: train(config, p, ALONE, resume=True)):
        with pytest.raises(ArgumentError, match=r"step-000006', which cannot be read.*step-000003"):
            use(where)
    (where / "latest").write_text("step-000003\n")
    assert train(config, where, ALONE, resume=True).step == 6
    shutil.rmtree(where / "step-000006")
    with pytest.raises(ArgumentError, match=r"is missing.*step-000003"):
        checkpoint.find(where)
    (where / "step-000003" / "checkpoint.json").write_text("{}")
    with pytest.raises(ArgumentError, match="something else"):
        checkpoint.load_model(where / "step-000003")


def test_runs_are_not_overwritten_or_confused(data, tmp_path):
    config, where = run_config(data, steps=1), tmp_path / "run"
    with pytest.raises(ArgumentError, match="directory of a run"):
        train(config, where, ALONE, resume=True)
    train(config, where, ALONE)
    with pytest.raises(ArgumentError, match="overwrite"):
        train(config, where, ALONE)
    (tmp_path / "early").mkdir()
    (tmp_path / "early" / "log.jsonl").write_text(
        '{"step": 1, "loss": 0.0}\n{"st'
    )  # killed before its first checkpoint
    with pytest.raises(ArgumentError, match="overwrite"):
        train(config, tmp_path / "early", ALONE)
    train(config, tmp_path / "early", ALONE, resume=True)
    assert losses(tmp_path / "early") == losses(where)
    with pytest.raises(ArgumentError, match=r"learning_rate = 0.0001 \(saved: 0.003\)"):
        train(replace(config, learning_rate=1e-4), where, ALONE, resume=True)
    with pytest.raises(ArgumentError, match=r"model = .*'hidden_size': 32"):
        train(replace(config, model=TINY.replace(hidden_size=32)), where, ALONE, resume=True)
    other = tmp_path / "other.txt"
    other.write_text("other text " * 99)
    prepare(tmp_path / "other", text_files([other], 0.1, 0.1), Bytes())
    with pytest.raises(ArgumentError, match="other data"):
        train(replace(config, data=str(tmp_path / "other")), where, ALONE, resume=True)
    assert train(replace(config, checkpoint_every=7, micro_batch_size=1), where, ALONE, resume=True).step == 1
    assert train(config, where, ALONE, overwrite=True).step == 1


# Configurations


def test_configurations_survive_a_round_trip():
    assert TrainConfig.from_dict(json.loads(json.dumps(DEMO.to_dict()))) == DEMO


@pytest.mark.parametrize("path", sorted((SRC.parent / "recipes").glob("*.json")), ids=lambda p: p.stem)
def test_recipes_are_configurations(path):
    config = TrainConfig.from_dict(json.loads(path.read_text()))
    with torch.device("meta"):
        count = ParaRNNForCausalLM(config.model).num_parameters()
    assert 15e6 < count < 40e6


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "steps"),
        ("batch_size", 2.0, "batch_size"),
        ("sequence_length", 1, "at least 2"),
        ("learning_rate", 0, "learning_rate"),
        ("z_loss", -1, "z_loss"),
        ("warmup", 2, "fraction"),
        ("weight_decay", 3.0, "at most 1"),
        ("seed", -1, "seed"),
        ("precision", "fp8", "'bf16', 'fp32' or None"),
        ("micro_batch_size", 0, "micro_batch_size"),
        ("keep_checkpoints", 0, "keep_checkpoints"),
    ],
)
def test_bad_training_configurations_name_the_field(field, value, words):
    with pytest.raises(ArgumentError, match=words):
        replace(DEMO, **{field: value})


def test_unknown_keys_and_models_are_named():
    facts = DEMO.to_dict()
    with pytest.raises(ArgumentError, match="'stepz'"):
        TrainConfig.from_dict({**facts, "stepz": 1})
    with pytest.raises(ArgumentError, match=r"'mamba'; expected one of pararnn"):
        TrainConfig.from_dict({**facts, "model": {**facts["model"], "model_type": "mamba"}})
    with pytest.raises(ArgumentError, match="'heads'"):
        TrainConfig.from_dict({**facts, "model": {**facts["model"], "heads": 1}})


def test_batches_divide_among_processes():
    config = replace(DEMO, batch_size=12, micro_batch_size=2)
    assert [config.micro_batch(n) for n in (1, 2, 3, 6)] == [2, 2, 2, 2]
    with pytest.raises(ArgumentError, match="multiple of the 5 processes"):
        config.micro_batch(5)
    with pytest.raises(ArgumentError, match="divisor of the 3 windows"):
        config.micro_batch(4)


def test_a_vocabulary_too_small_for_the_data_is_explained(data, tmp_path):
    with pytest.raises(ArgumentError, match=r"model.vocab_size: got 100; expected at least 256"):
        train(run_config(data, model=TINY.replace(vocab_size=100)), tmp_path / "run", ALONE)


def test_an_unknown_device_is_explained():
    assert main(["train", "demo", "--device", "abacus"]) == 2


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_are_compiled_once_and_computed_the_same(checkpointed, bf16, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    ids, reset = torch.randint(0, 256, (2, 24)), torch.rand(2, 24) < 0.1
    gradients = []
    for compiled in (False, True):
        model = build_model(TINY)
        place(model, ALONE, seed=0, bf16=bf16, compiled=compiled, checkpointed=checkpointed)
        with precision(ALONE, bf16):
            loss = model(ids, labels=ids, reset=reset).loss
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert counters["frames"]["ok"] == len(graphs) == 1  # one graph for both blocks
    assert not counters["graph_break"]
    assert [n.target for n in graphs[0].graph.nodes if "parashoot" in str(n.target)] == [
        torch.ops.parashoot.scan.default
    ]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_of_clipped_weights_do_not_depend_on_how_a_batch_is_cut(data, tmp_path):
    """Micro-batches disagree about the way in which some entries beyond the clip ought to go."""
    found = {}
    for size in (4, 1):
        run = train(run_config(data, steps=1, batch_size=4, micro_batch_size=size), tmp_path / str(size), ALONE)
        model = new_model(0).double()
        run.model.double().load_state_dict(model.state_dict())
        batch = run.batch(*Windows(run.data.split("train"), 24, 0).draw(4))
        for layer in run.model.recurrent_layers():
            layer.weight_hh_l0.data.mul_(3)
        weights = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        run.passes(batch)
        found[size] = {n: p.grad for n, p in run.model.named_parameters()}
    for name, grad in found[4].items():
        torch.testing.assert_close(found[1][name], grad, rtol=1e-9, atol=1e-12)
    w, g = (torch.cat([v[n].flatten() for n in v if n.endswith("weight_hh_l0")]) for v in (weights, found[4]))
    beyond = w.abs() > TINY.recurrent_clip
    assert int(beyond.sum()) >= 8
    assert bool((g[beyond] * w[beyond] >= 0).all())  # a step against the gradient never goes further out
    assert bool((g[beyond] == 0).any()) and bool((g[beyond] != 0).any())


def test_a_run_that_went_back_keeps_what_it_saves(data, tmp_path):
    config, run = run_config(data, checkpoint_every=1, keep_checkpoints=6), tmp_path / "run"
    train(config, run, ALONE)
    (run / "latest").write_text("step-000002\n")
    (run / "step-000009.partial").mkdir()  # left by a kill
    went = train_until(replace(config, keep_checkpoints=1), run, 3, resume=True)
    assert went.interrupted and checkpoint.find(run).name == "step-000003"
    assert [p.name for p in checkpoint.steps(run)] == [f"step-00000{k}" for k in (3, 4, 5, 6)]
    assert not list(run.glob("*.partial"))
    assert train(config, run, ALONE, resume=True).step == 6
