"""The directory of a run: nothing in it that a run did not make is lost, and one process at a time trains there."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from parashoot.errors import ArgumentError
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
