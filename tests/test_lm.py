"""Training a language model: data, evaluation, speed, runs that can be interrupted anywhere."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace

import pytest
import torch

from lm_models import TINY, tiny_model, tokens
from parashoot.errors import ArgumentError
from parashoot.lm import ParaRNNForCausalLM, checkpoint
from parashoot.lm import train as training
from parashoot.lm.data import Windows, load_text, split
from parashoot.lm.evaluate import bits_per_byte
from parashoot.lm.presets import DEMO
from parashoot.lm.speed import layer_speed, plain_loop
from parashoot.lm.train import DivergedError, parameter_groups, train
from parashoot.lm.train_config import TrainConfig


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"%d and %d are %d; " % (a, b, a + b) for a in range(20) for b in range(20)))
    return str(path)


def run_config(text: str, **changes) -> TrainConfig:
    base = {"model": TINY, "steps": 6, "batch_size": 2, "sequence_length": 24, "learning_rate": 3e-3, "text": text}
    return TrainConfig(**{**base, **changes})


def test_a_training_survives_a_round_trip():
    assert TrainConfig.from_dict(json.loads(json.dumps(DEMO.to_dict()))) == DEMO


# Data and evaluation


def test_the_shipped_text_is_ascii_and_long():
    corpus = load_text()
    assert len(corpus) > 5_000_000
    assert corpus.isascii()


def test_unusable_texts_are_explained(tmp_path):
    with pytest.raises(ArgumentError, match="existing file"):
        load_text(tmp_path / "none.txt")
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ArgumentError, match="empty"):
        load_text(empty)
    with pytest.raises(ArgumentError, match="at least 640"):
        split(b"x" * 600, 32)


def test_windows_continue_from_a_saved_state():
    data = torch.arange(200, dtype=torch.uint8)
    windows = Windows(data, 3, 10, seed=5)
    windows.draw()
    state = windows.state_dict()
    expected = windows.draw()
    again = Windows(data, 3, 10, seed=0)
    again.load_state_dict(state)
    assert torch.equal(again.draw(), expected)
    assert bool((expected.diff(dim=1) == 1).all())


def test_bits_per_byte_counts_every_byte_once():
    model = tiny_model()
    data = tokens(1, 101)[0].to(torch.uint8)
    out = model(data[None, :-1].long())
    nats = torch.nn.functional.cross_entropy(out.logits[0].float(), data[1:].long())
    assert bits_per_byte(model, data, streams=1, window=13) == pytest.approx(nats.item() / math.log(2), rel=1e-6)
    starts = [model(piece[None]).logits[0] for piece in data[:-1].long().split(34)]  # ceil(100 / 3)
    nats = torch.nn.functional.cross_entropy(torch.cat(starts).float(), data[1:].long())
    assert bits_per_byte(model, data, streams=3, window=13) == pytest.approx(nats.item() / math.log(2), rel=1e-6)


@pytest.mark.parametrize("cell", ["gru", "slstm", "headgru"])
def test_the_timed_loop_computes_the_same(cell):
    torch.manual_seed(0)
    model = ParaRNNForCausalLM(TINY.replace(cell=cell))
    layer, x = model.recurrent_layers()[0], torch.randn(1, 20, 16)
    torch.testing.assert_close(plain_loop(layer, x), layer(x)[0])
    speed = layer_speed(model, tokens(1, 40)[0], repeats=1)
    assert speed.error < 1e-5
    assert layer.solver is None


# Training


def test_a_tiny_model_learns(text, tmp_path):
    run = train(run_config(text, steps=60, batch_size=4, learning_rate=1e-2), tmp_path / "run")
    assert sum(run.losses[-5:]) / 5 < 0.6 * run.losses[0]


def test_only_matrices_decay():
    model = ParaRNNForCausalLM(TINY.replace(cell="headgru"))
    decayed, kept = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, kept = {names[id(p)] for p in decayed}, {names[id(p)] for p in kept}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mixer.rnn.weight_ih_l0"} <= decayed
    assert "model.layers.0.mixer.rnn.weight_hh_l0_R_z" in decayed
    assert {
        "model.layers.0.mixer.conv.weight",
        "model.layers.0.mixer.rnn.bias_l0",
        "model.layers.0.residual_scale",
        "model.norm.weight",
    } <= kept
    assert len(decayed) + len(kept) == len(names)


def test_the_learning_rate_rises_and_falls_to_zero(text):
    config = run_config(text, steps=100, warmup=0.1, learning_rate=1.0)
    rates = [config.learning_rate_at(k) for k in range(101)]
    assert rates[9] == rates[10] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(text, tmp_path, monkeypatch, number):
    config = run_config(text, checkpoint_every=4)
    straight = train(config, tmp_path / "straight")
    with monkeypatch.context() as patch:
        draw, calls = Windows.draw, []

        def signalled(self):
            calls.append(1)
            if len(calls) == 3:
                signal.raise_signal(number)
            return draw(self)

        patch.setattr(Windows, "draw", signalled)
        stopped = train(config, tmp_path / "run")
    assert stopped.interrupted
    assert stopped.step == 3
    torch.manual_seed(99)
    resumed = train(config, tmp_path / "run", resume=True)
    assert not resumed.interrupted
    assert resumed.losses == straight.losses
    for (name, mine), its in zip(resumed.model.named_parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(mine, its), name
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_continues_from_its_last_checkpoint(text, tmp_path, monkeypatch):
    config = run_config(text, checkpoint_every=2)
    straight = train(config, tmp_path / "straight")
    update = training._update
    with monkeypatch.context() as patch:
        patch.setattr(training, "_update", lambda run: update(run) if run.step < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    assert train(config, tmp_path / "run", resume=True).losses == straight.losses
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 6


def test_a_non_finite_loss_stops_and_keeps_the_checkpoint(text, tmp_path, monkeypatch):
    update = training._update

    def poisoned(run):
        if run.step == 3:
            run.model.model.norm.weight.data.fill_(math.nan)
        return update(run)

    monkeypatch.setattr(training, "_update", poisoned)
    with pytest.raises(DivergedError, match=r"loss is nan at step 4; the checkpoint of step 2 is kept"):
        train(run_config(text, checkpoint_every=2), tmp_path / "run")
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert saved["step"] == 2
    assert all(bool(torch.isfinite(p).all()) for p in saved["model"].values())


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})

    def fails(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1


def test_runs_are_not_overwritten_or_confused(text, tmp_path):
    config, where = run_config(text, steps=1), tmp_path / "run"
    with pytest.raises(ArgumentError, match=r"resume.*checkpoint.pt"):
        train(config, where, resume=True)
    train(config, where)
    with pytest.raises(ArgumentError, match="overwrite"):
        train(config, where)
    with pytest.raises(ArgumentError, match="learning_rate"):
        train(replace(config, learning_rate=1e-4), where, resume=True)
    with open(text, "ab") as file:
        file.write(b"more")
    with pytest.raises(ArgumentError, match="changed since"):
        train(config, where, resume=True)
    assert train(config, where, overwrite=True).step == 1


def test_foreign_files_are_no_checkpoints(tmp_path):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ArgumentError, match="cannot be read"):
        checkpoint.load(path)
    torch.save({"a": 1}, path)
    with pytest.raises(ArgumentError, match="something else"):
        checkpoint.load(path)


def test_unknown_devices_are_explained(text, tmp_path):
    with pytest.raises(ArgumentError, match="device"):
        train(run_config(text), tmp_path / "run", device="abacus")
