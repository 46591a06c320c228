"""Results files: what a kill cut off, what is no such file, and several processes at one."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from parashoot.bench.rows import add_rows, open_rows, read_rows
from parashoot.errors import ArgumentError
from parashoot.lock import lock


def rows_of(path) -> list[dict]:
    found: list[dict] = []
    read_rows(path, "FILE", "parashoot tasks run", "trial", lambda row: found.append({"trial": row["trial"]}))
    return found


def test_what_was_cut_off_is_left_out_and_kept_beside(tmp_path):
    path = tmp_path / "r.jsonl"
    add_rows(path, [{"trial": 1}])
    with path.open("a") as file:
        file.write('{"trial": 2, "cur')
    assert rows_of(path) == [{"trial": 1}]
    add_rows(path, [{"trial": 3}, {"trial": 4}])
    assert rows_of(path) == [{"trial": k} for k in (1, 3, 4)]
    assert (tmp_path / "r.jsonl.cut").read_text() == '{"trial": 2, "cur\n'


def test_a_character_cut_in_two_and_zeros_from_a_lost_page(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'{"trial": 1}\n{"trial": "\xc3' + bytes(7))
    assert rows_of(path) == [{"trial": 1}]
    add_rows(path, [{"trial": 2}])
    assert rows_of(path) == [{"trial": 1}, {"trial": 2}]


def test_a_row_without_its_end_of_line_is_a_row(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"trial": 1}')
    add_rows(path, [{"trial": 2}])
    assert rows_of(path) == [{"trial": 1}, {"trial": 2}]


@pytest.mark.parametrize(
    "text",
    [
        b"my notes",
        b'{"runs": []}',
        b'{"trial": 1}\nnotes\n{"trial": 2}\n',
        b"[1]\n",
        b"\xff\xfe{\n",
        b'{"trial": 2}garbage',
    ],
)
def test_what_is_no_results_file_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "mine"
    path.write_bytes(text)
    with pytest.raises(ArgumentError, match=r"FILE: got .*mine.*; expected .* as parashoot tasks run writes"):
        rows_of(path)
    assert path.read_bytes() == text


def test_whether_rows_can_be_written_is_seen_first(tmp_path):
    for bad, words in ((tmp_path, "a directory"), (tmp_path / "a.png", "where a plot would go"), ("/proc/no/r", "r'")):
        with pytest.raises(ArgumentError, match=f"--out: got .*{words}"):
            open_rows(type(tmp_path)(bad), "--out")
    open_rows(tmp_path / "new" / "r.jsonl", "--out")
    assert (tmp_path / "new").is_dir()


def test_a_process_waits_until_another_has_written(tmp_path):
    path, spawn = tmp_path / "r.jsonl", multiprocessing.get_context("spawn")
    path.write_text('{"trial": "cut')
    with path.open("a") as file:
        assert lock(file.fileno())
        other = spawn.Process(target=add_rows, args=(path, [{"trial": 2}]))
        other.start()
        other.join(6)  # it needs one to start
        assert other.is_alive() and path.read_text() == '{"trial": "cut'
        file.write(' off"}\n')
    other.join()
    assert other.exitcode == 0 and rows_of(path) == [{"trial": "cut off"}, {"trial": 2}]


def _many(path, name):
    for k in range(60):
        add_rows(path, [{"trial": [name, k], "text": "x" * 30_000}])


def test_processes_do_not_write_over_one_another(tmp_path):
    path, spawn = tmp_path / "r.jsonl", multiprocessing.get_context("spawn")
    path.write_text('{"trial": "cut off')
    both = [spawn.Process(target=_many, args=(path, name)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    found = [json.loads(line)["trial"] for line in path.read_text().splitlines()]
    assert sorted(found) == sorted([name, k] for name in "ab" for k in range(60))
