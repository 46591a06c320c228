"""The directory of a run: nothing in it that a run did not make is lost, and one process at a time trains there."""

import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from parashoot.errors import ArgumentError, MissingPackageError
from parashoot.lm.export import tokenizer_file
from parashoot.lm.prepare import prepare
from parashoot.lm.sources import by_content
from parashoot.lm.tokenizer import Subwords
from parashoot.lm.train import train
from parashoot.lock import held, lock
from test_train import ALONE, TINY, run_config

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Data with a tokenizer."""
    where = tmp_path_factory.mktemp("data") / "words"
    texts = [f"{a} and {b} are {a + b}; " for a in range(20) for b in range(20)]
    prepare(where, lambda: by_content(texts, 0.1, 0.1), Subwords.train((t.encode() for t in texts), 300))
    return where


def config(data: Path, **changes):
    return run_config(str(data), model=TINY.replace(vocab_size=300), steps=2, **changes)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "report.json", "loss.png", "step-000007/weights", "tensorboard/mine"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_no_run_are_left_alone(words, tmp_path, name, overwrite):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ArgumentError, match=rf"directory: got .*, with {name.partition('/')[0]} of no run"):
        train(config(words), tmp_path, ALONE, overwrite=overwrite)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_run_does_not_go_where_its_data_are(words):
    before = contents(words)
    with pytest.raises(ArgumentError, match=r"directory: got .*, which holds the data; expected another"):
        train(config(words), words, ALONE)
    assert contents(words) == before


def test_a_run_that_ended_before_its_first_line_begins_again(words, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((words / "tokenizer.json").read_bytes())
    assert train(config(words), tmp_path, ALONE).step == 2
    assert train(config(words), tmp_path, ALONE, overwrite=True).step == 2


def test_a_run_that_is_refused_leaves_no_directory(words, tmp_path):
    for changes, resume in (({"data": str(tmp_path / "none")}, False), ({}, True)):
        with pytest.raises(ArgumentError):
            train(replace(config(words), **changes), tmp_path / "new", ALONE, resume=resume)
        assert not (tmp_path / "new").exists()


def test_two_do_not_train_in_one_directory(words, tmp_path):
    place = os.open(tmp_path, os.O_RDONLY)
    assert lock(place)
    with pytest.raises(ArgumentError, match=r"directory: got .*, in which another process trains"):
        train(config(words), tmp_path, ALONE)
    assert contents(tmp_path) == {}
    os.close(place)
    assert train(config(words), tmp_path, ALONE).step == 2


def test_a_process_forked_meanwhile_does_not_keep_the_directory(tmp_path):
    with held(tmp_path) as mine:
        assert mine
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    with held(tmp_path) as mine:
        assert mine
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_run_is_not_lost_to_a_missing_package(words, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(config(words), run, ALONE)
    before = contents(run)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingPackageError, match="TensorBoard"):
        train(config(words, tensorboard=True), run, ALONE, overwrite=True)
    assert contents(run) == before


def test_a_checkpoint_knows_its_tokenizer_wherever_it_is(words, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(config(words), run, ALONE)
    mine = (run / "tokenizer.json").read_bytes()
    copied, link = tmp_path / "copied", tmp_path / "link"
    shutil.copytree(run / "step-000002", copied)
    link.symlink_to(run / "step-000002")
    monkeypatch.chdir(run / "step-000002")
    for place in (run, run / "step-000002", copied, link, "."):
        found = tokenizer_file(place)
        assert found is not None
        assert found.read_bytes() == mine
    for step in run.glob("step-*"):  # as checkpoints were before they had one of their own
        (step / "tokenizer.json").unlink()
    assert tokenizer_file(".") == tokenizer_file(link) == run / "tokenizer.json"
    assert tokenizer_file(copied) is not None
