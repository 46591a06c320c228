"""`parashoot export`: the directory gives the run's logits, its tokens and its text, and is written whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError

from lm_models import tokens, transformers
from parashoot.cli import main
from parashoot.errors import ArgumentError
from parashoot.lm import ParaRNNForCausalLM, generate
from parashoot.lm.checkpoint import load_model
from parashoot.lm.export import byte_tokenizer, export, text_tokenizer
from parashoot.lm.tokenizer import EOT, read_tokenizer

tokenizers: Any = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A directory with the runs `runs/bytes` and `runs/subwords`, each with the checkpoints of steps 1 and 2."""
    here = tmp_path_factory.mktemp("runs")
    text = here / "text.txt"
    text.write_text("".join(f"{a} × {b} = {a * b}. " for a in range(20) for b in range(20)))
    model = {"hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "intermediate_size": 32}
    small = {"steps": 2, "batch_size": 2, "sequence_length": 24, "learning_rate": 0.01, "checkpoint_every": 1}
    for name, vocab, more in (("bytes", 256, []), ("subwords", 280, ["--train-bpe", "280"])):
        data, recipe = here / f"data-{name}", here / f"{name}.json"
        assert main(["data", str(data), "--text", str(text), *more]) == 0
        facts = {**small, "model": {**model, "vocab_size": vocab}, "data": str(data)}
        recipe.write_text(json.dumps(facts))
        assert main(["train", str(recipe), "--out", str(here / "runs" / name)]) == 0
    return here / "runs"


def loaded(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


def test_logits_are_those_of_the_run(runs, tmp_path):
    export(runs / "bytes", tmp_path / "out")
    export(runs / "bytes", tmp_path / "half", "bf16")
    export(runs / "bytes" / "step-000001", tmp_path / "first")
    ids, model = tokens(2, 19), load_model(runs / "bytes")
    assert isinstance(loaded(tmp_path / "out"), ParaRNNForCausalLM)
    assert torch.equal(loaded(tmp_path / "out")(ids).logits, model(ids).logits)
    first = load_model(runs / "bytes" / "step-000001")(ids).logits
    assert torch.equal(loaded(tmp_path / "first")(ids).logits, first) and not torch.equal(first, model(ids).logits)
    half = loaded(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half(ids).logits, model.bfloat16()(ids).logits)


@given(st.text())
def test_tokens_of_bytes_are_the_bytes(text):
    tokenizer = byte_tokenizer()
    assert tokenizer.encode(text).ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


@given(st.binary())
def test_broken_bytes_are_decoded_as_python_does(data):
    assert byte_tokenizer().decode(list(data)) == data.decode(errors="replace")


def test_the_tokenizer_of_bytes_loads(runs, tmp_path):
    export(runs / "bytes", tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = " Don 't ,  <s>Ā\n\té × 中\U0001f600\x00"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(tokenizer) == 256


def test_subwords_and_the_end_of_text_are_kept(runs, tmp_path):
    export(runs / "subwords" / "step-000002", tmp_path / "out")
    inner = tokenizers.Tokenizer.from_file(str(runs / "subwords" / "tokenizer.json"))
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), loaded(tmp_path / "out")
    text = "3 × 4 = 12. New"
    assert tokenizer(text)["input_ids"] == inner.encode(text).ids
    assert tokenizer.decode(inner.encode(text).ids) == text
    end = inner.token_to_id(EOT)
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == end
    named = text_tokenizer(runs / "subwords", model.config.replace(eos_token_id=7))
    assert named.eos_token_id == 7 and named.eos_token == inner.id_to_token(7)


def test_transformers_generates_what_parashoot_does(runs, tmp_path):
    export(runs / "bytes", tmp_path / "out")
    ids, model = tokens(1, 5), loaded(tmp_path / "out")
    made = model.generate(ids, max_new_tokens=9, do_sample=False)[0, 5:].tolist()
    assert made == generate(load_model(runs / "bytes"), ids[0], 9, temperature=0.0)


@pytest.mark.parametrize("name", ["bytes", "subwords"])
def test_commands_take_the_directory_for_the_run(runs, tmp_path, capsys, name):
    run, out, data = str(runs / name), str(tmp_path / "out"), str(runs.parent / f"data-{name}")
    assert main(["export", run, out]) == 0
    assert "AutoModelForCausalLM" in capsys.readouterr().out
    texts, figures = [], []
    for checkpoint in (run, out):
        assert main(["generate", "--checkpoint", checkpoint, "--prompt", "3 ×", "--tokens", "12"]) == 0
        texts.append(capsys.readouterr().out)
        assert main(["eval", checkpoint, "--data", data, "--split", "validation", "--lengths", "20"]) == 0
        lines = capsys.readouterr().out.splitlines()
        figures.append([line for line in lines if "of validation" not in line and "in pieces" not in line])
    assert texts[0] == texts[1]
    assert figures[0] == figures[1] and len(figures[0]) > 5
    assert main(["eval", out]) == 2
    assert "--data" in capsys.readouterr().err


def test_nothing_is_overwritten_and_nothing_half_written(runs, tmp_path, monkeypatch, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "note").write_text("mine")
    assert main(["export", str(runs / "bytes"), str(full)]) == 2
    assert "new directory" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["full"] and (full / "note").read_text() == "mine"
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    with pytest.raises(ArgumentError, match="dtype"):
        export(runs / "bytes", tmp_path / "out", "fp8")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full_disk)
    assert main(["export", str(runs / "bytes"), str(tmp_path / "out")]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["full"]

    def full_disk_of_weights(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(ParaRNNForCausalLM, "save_pretrained", full_disk_of_weights)
    capsys.readouterr()
    assert main(["export", str(runs / "bytes"), str(tmp_path / "out")]) == 2
    assert "could not be written" in capsys.readouterr().err


def test_data_of_another_tokenizer_are_refused(runs, tmp_path, capsys):
    """Equal vocabularies, another tokenizer: bits per byte would mean nothing."""
    other, text = tmp_path / "other", runs.parent / "text.txt"
    text.with_name("others.txt").write_text("".join(f"{a} - {b}; " for a in range(30) for b in range(30)))
    assert main(["data", str(other), "--text", str(text.with_name("others.txt")), "--train-bpe", "280"]) == 0
    export(runs / "subwords", tmp_path / "out")
    capsys.readouterr()
    for name in (runs / "subwords", runs / "subwords" / "step-000001", tmp_path / "out"):
        for wrong in (other, runs.parent / "data-bytes"):
            assert main(["eval", str(name), "--data", str(wrong), "--split", "validation"]) == 2
            assert "which" in (said := capsys.readouterr().err) and "was trained on" in said
        assert main(["eval", str(name), "--data", str(runs.parent / "data-subwords"), "--split", "validation"]) == 0
    export(runs / "bytes", tmp_path / "bytes")
    for name in (runs / "bytes", tmp_path / "bytes"):
        assert main(["eval", str(name), "--data", str(runs.parent / "data-bytes"), "--split", "validation"]) == 0


def test_a_run_of_subwords_stops_at_the_end_of_a_text(runs, capsys, monkeypatch):
    seen = []

    def generate(model, ids, count, **options):
        seen.append(model.config.eos_token_id)
        return [*ids.tolist(), *ids.tolist()]

    monkeypatch.setattr(sys.modules["parashoot.lm.generate"], "generate", generate)
    assert main(["generate", "--checkpoint", str(runs / "subwords"), "--prompt", "7 × 8"]) == 0
    tokenizer = read_tokenizer(runs / "subwords" / "tokenizer.json")
    assert seen == [tokenizer.token_to_id(EOT)]
    assert capsys.readouterr().out == "7 × 87 × 87 × 8\n"
