"""Data: shards hold the text byte for byte, windows come in one order whatever the number of processes, damage is named."""

from __future__ import annotations

import itertools
import json
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parashoot.cli import main
from parashoot.errors import ArgumentError
from parashoot.lm import sources
from parashoot.lm.data import Tokens, Windows, check_data, corpus, open_data
from parashoot.lm.order import Permutation
from parashoot.lm.prepare import prepare
from parashoot.lm.sources import Piece, enwik8, text_files
from parashoot.lm.tokenizer import EOT, Bytes, Subwords

TEXT = "Grüße, 世界! ∀x: x² ≥ 0. 🙂\n" * 40
DOCUMENTS = [f"Document {k} counts {' '.join(map(str, range(k)))}.\n" for k in range(60)]


def tokens(values: list[int], starts: tuple[int, ...] = (0,), cuts: tuple[int, ...] = ()) -> Tokens:
    shards = np.split(np.array(values, np.uint16), cuts)
    return Tokens("made up", shards, np.array(starts, np.uint64), len(values))


def starts_drawn(windows: Windows, batches: int, size: int) -> list[int]:
    """First tokens of the windows, which on data 0, 1, 2, ... are where they begin."""
    return [int(v) for _ in range(batches) for v in windows.draw(size)[0][:, 0]]


# The order


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
@pytest.mark.parametrize("key", [0, 1, 2**63 + 5])
def test_a_permutation_visits_everything_once(count, key):
    assert sorted(Permutation(count, key)(np.arange(count)).tolist()) == list(range(count))


def test_permutations_differ_by_key_and_from_the_identity():
    one, two = (Permutation(1000, key)(np.arange(1000)) for key in (1, 2))
    for v in (one, two):
        assert (v == np.arange(1000)).sum() < 10
        assert abs(np.corrcoef(v, np.arange(1000))[0, 1]) < 0.15
    assert (one == two).sum() < 10


def test_a_permutation_of_billions_is_computed_in_place():
    assert Permutation(10**12, 5)(np.array([0, 10**12 - 1])).max() < 10**12


@given(st.integers(2, 400), st.integers(2, 20), st.integers(0, 9))
def test_an_epoch_predicts_every_token_at_most_once(total, length, seed):
    if total < length:
        return
    windows = Windows(tokens(list(range(total))), length, seed)
    ids = windows.draw(windows.count)[0]
    assert (windows.epoch, windows.position) == (1, 0)
    assert bool((ids.diff(dim=1) == 1).all())
    predicted = ids[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted)
    assert len(predicted) > total - 1 - 2 * (length - 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_the_global_batch_is_the_same_on_any_number_of_processes(ranks):
    data = tokens(list(range(500)), starts=(0, 100, 101, 333))
    alone = Windows(data, 20, seed=3)
    together = [Windows(data, 20, seed=3) for _ in range(ranks)]
    for _ in range(9):  # across the ends of epochs
        ids, reset = alone.draw(6)
        assert reset is not None
        parts = [w.draw(6, rank, ranks) for rank, w in enumerate(together)]
        assert [row for part, _ in parts for row in part.tolist()] == ids.tolist()
        assert [row for _, part in parts if part is not None for row in part.tolist()] == reset.tolist()


def test_a_saved_position_continues_on_another_number_of_processes():
    data = tokens(list(range(500)))
    windows = Windows(data, 20, seed=3)
    starts_drawn(windows, 5, 12)
    state = json.loads(json.dumps(windows.state_dict()))
    expected = starts_drawn(windows, 4, 12)
    resumed = [Windows(data, 20, seed=3) for _ in range(4)]
    for w in resumed:
        w.load_state_dict(state)
    found = [int(v) for _ in range(4) for rank, w in enumerate(resumed) for v in w.draw(12, rank, 4)[0][:, 0]]
    assert found == expected


def test_epochs_differ_in_order_and_offset():
    windows = Windows(tokens(list(range(2000))), 20, seed=0)
    epochs = [starts_drawn(windows, 1, windows.count) for _ in range(4)]
    assert len({v % 19 for epoch in epochs for v in epoch}) > 1
    assert len({tuple(np.argsort(epoch)) for epoch in epochs}) == 4


# Windows


@given(st.lists(st.integers(0, 99), unique=True, max_size=8), st.integers(0, 90), st.integers(1, 10))
def test_reading_and_resets_across_shards(starts, at, length):
    data = tokens(list(range(100, 200)), tuple(sorted({0, *starts})), cuts=(1, 30, 31, 77))
    assert data.read(at, at + length).tolist() == list(range(100 + at, 100 + at + length))
    assert [at + k for k in data.resets(at, at + length).nonzero()[0]] == sorted(
        {0, *starts} & set(range(at, at + length))
    )


def test_one_document_needs_no_resets():
    assert Windows(tokens(list(range(50))), 10, 0).draw(2)[1] is None


def test_too_little_data_is_explained():
    with pytest.raises(ArgumentError, match=r"9 tokens.*window of 10"):
        Windows(tokens(list(range(9))), 10, 0)


def test_the_shipped_text_is_ascii_and_long():
    data = corpus()
    assert len(data.split("train")) > 5_000_000
    assert data.split("train").read(0, 10**6).max() < 128
    assert len(data.split("validation")) == round(0.05 * (len(data.split("train")) + len(data.split("validation"))))


# Shards


def written(directory: Path, name: str) -> bytes:
    return b"".join(p.read_bytes() for p in sorted(directory.glob(f"{name}-0*.bin")))


def test_text_as_bytes_round_trips(tmp_path):
    a, b = tmp_path / "a.txt", tmp_path / "b.txt"
    a.write_text(TEXT)
    b.write_bytes(bytes(range(256)) * 9)
    index = prepare(tmp_path / "out", text_files([a, b], 0.1, 0.05), Bytes(), shard=1000)
    whole = a.read_bytes() + b.read_bytes()
    assert b"".join(written(tmp_path / "out", name) for name in ("train", "validation", "test")) == whole
    data = open_data(tmp_path / "out")
    assert (data.vocab_size, data.eot, index["dtype"]) == (256, None, "uint8")
    assert len(index["splits"]["train"]["shards"]) == -(-len(data.split("train")) // 1000) > 2
    assert data.split("train").starts.tolist() == [0, a.stat().st_size]
    assert data.split("train").read(0, len(data.split("train"))).astype(np.uint8).tobytes() == written(
        tmp_path / "out", "train"
    )
    assert abs(len(data.split("test")) - 0.05 * len(whole)) <= 3
    assert check_data(tmp_path / "out") == sum(len(s["shards"]) + 1 for s in index["splits"].values())


def test_splits_begin_at_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE", 7)
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    for share in np.linspace(0.01, 0.5, 23):
        pieces = list(text_files([path], share, 0.1)())
        assert "".join(p.text.decode() for p in pieces) == TEXT
        assert [p.begins for p in pieces if p.split == "validation"][:2] == [True, False]


def test_subwords_round_trip_with_a_token_before_each_document(tmp_path):
    pytest.importorskip("tokenizers")
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"body": text}) + "\n" for text in [*DOCUMENTS, TEXT]))
    assert main(["data", str(tmp_path / "out"), "--jsonl", str(lines), "--field", "body", "--train-bpe", "300"]) == 0
    data = open_data(tmp_path / "out")
    assert data.tokenizer is not None
    tokenizer = Subwords.from_file(data.tokenizer)
    assert (data.vocab_size, data.eot) == (300, tokenizer.tokenizer.token_to_id(EOT))
    texts = []
    for split in data.splits.values():
        edges = [*split.starts.astype(int).tolist(), len(split)]
        for start, stop in itertools.pairwise(edges):
            assert split.read(start, start + 1).tolist() == [data.eot]
            texts.append(tokenizer.tokenizer.decode(split.read(start + 1, stop).tolist(), skip_special_tokens=False))
    assert sorted(texts) == sorted([*DOCUMENTS, TEXT])
    assert sum(s.bytes for s in data.splits.values()) == sum(len(t.encode()) for t in texts)
    again = [
        "data",
        str(tmp_path / "again"),
        "--jsonl",
        str(lines),
        "--field",
        "body",
        "--tokenizer",
        str(data.tokenizer),
    ]
    assert main(again) == 0
    assert open_data(tmp_path / "again").fingerprint == data.fingerprint


def test_equal_documents_share_a_split():
    pieces = list(sources.by_content([f"{k % 50}" for k in range(500)], 0.3, 0.3))
    where = {p.text: {q.split for q in pieces if q.text == p.text} for p in pieces}
    assert {len(v) for v in where.values()} == {1}
    assert {name for v in where.values() for name in v} == {"train", "validation", "test"}


def test_a_hugging_face_data_set(tmp_path, monkeypatch, capsys):
    asked = []

    def load_dataset(name, subset, *, split, streaming):
        asked.append((name, subset, split, streaming))
        return [{"text": t, "id": 1} for t in DOCUMENTS]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    command = ["data", str(tmp_path / "out"), "--hf", "org/name", "--subset", "en", "--split", "test", "--streaming"]
    assert main(command) == 0
    assert asked == [("org/name", "en", "test", True)]
    assert sum(s.bytes for s in open_data(tmp_path / "out").splits.values()) == len("".join(DOCUMENTS))
    assert "'body', no text in row 0 of 'org/name'; it has text, id" in fails(
        capsys, "data", str(tmp_path / "other"), "--hf", "org/name", "--field", "body"
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'parashoot[data]'" in fails(capsys, "data", str(tmp_path / "other"), "--hf", "org/name")


def test_enwik8_is_split_as_the_field_does(monkeypatch):
    text = np.random.default_rng(0).bytes(10**5)
    monkeypatch.setattr(sources, "_fetched_enwik8", lambda: text)
    monkeypatch.setattr(sources, "ENWIK8_SPLITS", {k: v // 1000 for k, v in sources.ENWIK8_SPLITS.items()})
    pieces = list(enwik8()())
    assert b"".join(p.text for p in pieces) == text
    sizes = {n: sum(len(p.text) for p in pieces if p.split == n) for n in sources.ENWIK8_SPLITS}
    assert sizes == {"train": 90_000, "validation": 5_000, "test": 5_000}


def test_enwik8_without_a_network_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sources, "ENWIK8", "mingru-pytorch==0.0.0.dev999")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    error = fails(capsys, "data", str(tmp_path / "out"), "enwik8")
    assert "no download" in error
    assert "--text enwik8" in error
    assert not (tmp_path / "out").exists()


# Damage and misuse


def fails(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("parashoot data: ")]
    assert len(error) == 1
    return error[0]


@pytest.fixture
def out(tmp_path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    prepare(tmp_path / "out", text_files([path], 0.1, 0.1), Bytes())
    return tmp_path / "out"


def test_missing_truncated_and_changed_shards_are_named(out):
    shard = out / "validation-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ArgumentError, match=r"validation-00000.bin.*bytes; expected .* bytes"):
        open_data(out)
    shard.write_bytes(content[:-1] + b"#")
    open_data(out)
    with pytest.raises(ArgumentError, match=r"validation-00000.bin', SHA-256"):
        check_data(out)
    shard.unlink()
    with pytest.raises(ArgumentError, match="missing"):
        open_data(out)


def test_foreign_indexes_are_refused(out):
    for text, words in (("{", "not JSON"), ('{"format": 99}', "something else"), ("[]", "something else")):
        (out / "index.json").write_text(text)
        with pytest.raises(ArgumentError, match=words):
            open_data(out)
    (out / "index.json").unlink()
    with pytest.raises(ArgumentError, match="parashoot data"):
        open_data(out)
    with pytest.raises(ArgumentError, match="one of train, validation"):
        corpus().split("test")


def test_a_failure_leaves_nothing_behind(tmp_path):
    def broken():
        yield Piece("train", b"abc", True)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepare(tmp_path / "out", broken, Bytes())
    assert list(tmp_path.iterdir()) == []


def test_misuse_is_one_line(out, capsys, tmp_path):
    text, new = str(tmp_path / "a.txt"), str(tmp_path / "new")
    assert "a new directory" in fails(capsys, "data", str(out), "--text", text)
    assert "one of enwik8" in fails(capsys, "data", new)
    assert "one of enwik8" in fails(capsys, "data", new, "enwik8", "--text", text)
    assert "existing file" in fails(capsys, "data", new, "--text", "none.txt")
    assert "shares" in fails(capsys, "data", new, "--text", text, "--validation", "1")
    assert "both or neither" in fails(capsys, "data", new, "--text", text, "--eot", "x")
    assert "existing tokenizer.json" in fails(capsys, "data", new, "--text", text, "--tokenizer", "none.json")
    assert "at least 257" in fails(capsys, "data", new, "--text", text, "--train-bpe", "20")
    (tmp_path / "empty.txt").touch()
    assert "empty file" in fails(capsys, "data", new, "--text", str(tmp_path / "empty.txt"))
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "a"}\n{"txt": 1}\n')
    assert "line 2; it has txt" in fails(capsys, "data", new, "--jsonl", str(lines))
    lines.write_text("{")
    assert "line 1, which is not JSON" in fails(capsys, "data", new, "--jsonl", str(lines))
    lines.write_text("")
    assert "no text" in fails(capsys, "data", new, "--jsonl", str(lines))
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9 " * 9)
    assert "not UTF-8" in fails(capsys, "data", new, "--text", str(latin), "--train-bpe", "300")
    assert not Path(new).exists()
    assert main(["data", str(out), "--check"]) == 0


def test_a_tokenizer_that_cuts_and_pads_reads_the_whole_text(tmp_path):
    library = pytest.importorskip("tokenizers")
    plain = Subwords.train(iter([TEXT.encode()]), 300)
    ids = plain.encode([TEXT.encode()])
    cutting = library.Tokenizer.from_str(plain.tokenizer.to_str())
    cutting.enable_truncation(16)
    cutting.enable_padding(length=64)
    cutting.save(str(tmp_path / "tokenizer.json"))
    assert len(ids[0]) > 64
    assert Subwords.from_file(tmp_path / "tokenizer.json").encode([TEXT.encode(), b"a"])[0] == ids[0]


def test_a_token_that_stands_in_a_text_is_text(tmp_path):
    pytest.importorskip("tokenizers")
    trained = Subwords.train(iter([TEXT.encode()]), 300)
    text = f"before {EOT} after"
    (ids,) = trained.encode([text.encode()])
    assert trained.eot not in ids and trained.tokenizer.decode(ids) == text


def test_a_vocabulary_reaches_to_its_largest_token(tmp_path):
    library = pytest.importorskip("tokenizers")
    words = library.Tokenizer(library.models.WordLevel({EOT: 0, "a": 1, "b": 299}, unk_token=EOT))
    assert Subwords(words, EOT).vocab_size == 300


def test_resets_do_not_copy_the_index():
    starts = np.arange(0, 10**7, 2, dtype=np.uint64)
    data = Tokens("many", [np.zeros(10**7, np.uint8)], starts, 10**7)
    tracemalloc.start()
    found = data.resets(10**6, 10**6 + 8)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()
    assert found.tolist() == [True, False] * 4


def test_lines_may_be_blank_and_begin_with_a_mark(tmp_path, capsys):
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}\n  \n')
    assert main(["data", str(tmp_path / "out"), "--jsonl", str(lines), "--validation", "0", "--test", "0"]) == 0
    assert written(tmp_path / "out", "train") in (b"onetwo", b"twoone")
    lines.write_bytes(b'{"text": "\xff"}\n')
    assert "line 1, which is not JSON" in fails(capsys, "data", str(tmp_path / "new"), "--jsonl", str(lines))


def test_a_long_file_is_cut_where_words_begin(tmp_path, monkeypatch):
    """So that its tokens are those of the whole."""
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(sources, "PIECE", 64)
    text = "".join(f"{k} words and  {k * k} more\n{' ' * (k % 40)}in" for k in range(99)) + "x" * 200 + " y"
    file, trained = tmp_path / "a.txt", Subwords.train(iter([text.encode()]), 400)
    file.write_text(text)
    prepare(tmp_path / "out", text_files([file], 0.0, 0.0), trained)
    (whole,) = trained.encode([text.encode()])
    found = open_data(tmp_path / "out").split("train")
    ids = found.read(0, len(found)).tolist()[1:]
    assert trained.tokenizer.decode(ids) == text
    assert ids[: len(whole) - 120] == whole[: len(whole) - 120]  # what has no spaces is cut anywhere


@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_at_any_moment_leaves_nothing_in_the_way(tmp_path, monkeypatch, there):
    out, source = tmp_path / "out", lambda: iter([Piece("train", b"abc", True), Piece("test", b"abc", True)])
    if there:
        out.mkdir()
    moved = []

    def interrupted(old, new):
        if len(moved) == 2 or not there:
            raise KeyboardInterrupt
        moved.append(new)
        Path(old).rename(new)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(out, source, Bytes())
    assert list(tmp_path.iterdir()) == [out] * there and not (there and list(out.iterdir()))
    if there:
        (out / "out.partial-1").mkdir()  # of a process that was killed
    prepare(out, source, Bytes())
    assert open_data(out).split("train").read(0, 3).tolist() == list(b"abc")
    other = tmp_path / "other"
    other.mkdir()

    def slow():
        yield Piece("train", b"slow", True)
        with monkeypatch.context() as patch:  # another process, meanwhile
            patch.setattr("os.getpid", lambda: 1)
            prepare(other, source, Bytes())

    with pytest.raises(ArgumentError, match="there already"):
        prepare(other, slow, Bytes())
    assert open_data(other).split("train").read(0, 3).tolist() == list(b"abc")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ArgumentError, match="lead to themselves"):
        prepare(loop, source, Bytes())


def test_a_file_that_becomes_shorter_is_said_so(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abc " * 100)
    pieces = text_files([file], 0.0, 0.0)
    file.write_text("abc")
    with pytest.raises(ArgumentError, match="became shorter"):
        list(pieces())


def test_links_and_the_current_directory_are_where_they_lead(tmp_path, monkeypatch):
    file, there, here = tmp_path / "a.txt", tmp_path / "there", tmp_path / "here"
    file.write_text("abc " * 100)
    for directory in (there, here):
        directory.mkdir()
    (tmp_path / "link").symlink_to(there)
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    monkeypatch.chdir(here)
    for out in (tmp_path / "link", tmp_path / "dangling", "."):
        assert main(["data", str(out), "--text", str(file)]) == 0
    for directory in (there, tmp_path / "new", here):
        assert len(open_data(directory).split("train"))
    assert here.samefile(".")
    assert {p.name for p in tmp_path.iterdir()} == {"a.txt", "there", "here", "link", "new", "dangling"}
