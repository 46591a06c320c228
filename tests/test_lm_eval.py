"""The model type of lm-eval on tasks in local files, against sums over the log-probabilities of a loop over tokens."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_models import logits_by_loop, tiny_model
from parashoot.errors import ArgumentError
from parashoot.lm.checkpoint import load_model
from parashoot.lm.export import text_tokenizer
from parashoot.lm.tokenizer import EOT, Subwords

lm_eval: Any = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'parashoot[lm-eval]'")

SRC = Path(__file__).parents[1] / "src"
QUESTIONS = [
    {
        "question": "Q" + "x" * k + ": is it?",
        "choices": ["yes", "no, never", "é", "maybe"][: 2 + k % 3],
        "answer": k % 2,
    }
    for k in range(5)
]
TEXTS = [{"text": "word " * n + "× end."} for n in (1, 5, 40, 2)]
PROMPTS = [{"prompt": "a" * n + " times", "answer": ""} for n in (1, 5, 9, 2)]
TASKS = {
    "choices": ("multiple_choice", QUESTIONS, "doc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
                "metric_list: [{metric: acc}, {metric: acc_norm}]"),
    "rolling": ("loglikelihood_rolling", TEXTS, "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
                "metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]"),
    "continued": ("generate_until", PROMPTS, "doc_to_text: '{{prompt}}'\ndoc_to_target: answer\n"
                  "generation_kwargs: {until: ['U'], max_gen_toks: 9, do_sample: false}\n"
                  "metric_list: [{metric: exact_match}]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """The tasks of `TASKS` as lm-eval reads them, a file of YAML and one of JSON lines each."""
    here = tmp_path_factory.mktemp("tasks")
    for name, (kind, rows, rest) in TASKS.items():
        lines = here / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {lines}}}}}\ntest_split: test\n"
        (here / f"{name}.yaml").write_text(f"task: {name}\n{files}output_type: {kind}\n{rest}\n")
    return here


@pytest.fixture(scope="module", params=["bytes", "subwords"])
def saved(request, tmp_path_factory) -> Path:
    """A model that `save_pretrained` wrote, of bytes or with the tokenizer of a run."""
    here = tmp_path_factory.mktemp(request.param)
    subwords = request.param == "subwords"
    tiny_model(vocab_size=290 if subwords else 256).float().save_pretrained(here)
    if subwords:
        text = " ".join(json.dumps(row) for row in [*QUESTIONS, *TEXTS, *PROMPTS])
        Subwords.train(iter([text.encode()]), 290).tokenizer.save(str(here / "tokenizer.json"))
    return here


@pytest.fixture(scope="module")
def oracle(saved) -> Any:
    """(tokens given, tokens scored) -> ln p of each token scored, and the likeliest ones: in float64, token by token."""
    model = load_model(saved).double()

    def scores(given: list[int], scored: list[int]) -> tuple[list[float], list[int]]:
        logits = logits_by_loop(model, torch.tensor([*given, *scored]))[len(given) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(scored)[:, None])
        return chosen[:, 0].tolist(), logits.argmax(-1).tolist()

    return scores


def encoder(saved: Path) -> Any:
    """Text -> tokens, without the library's own class: the bytes, or what `tokenizers` says."""
    if not (saved / "tokenizer.json").exists():
        return lambda text: list(text.encode())
    inner = text_tokenizer(saved, load_model(saved).config).backend_tokenizer
    return lambda text: inner.encode(text).ids


def kind() -> Any:
    """The class under test, whose import registers it."""
    return importlib.import_module("parashoot.lm.lm_eval").ParashootLM


def results(saved: Path, tasks: Path, batch_size: int, window: int = 1024) -> Any:
    kind()
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model="parashoot", model_args={"pretrained": str(saved), "window": window}, batch_size=batch_size, device="cpu",
        tasks=list(TASKS), task_manager=manager, bootstrap_iters=0,
    )  # fmt: skip


@pytest.mark.parametrize(("batch_size", "window"), [(1, 1024), (3, 1024), (4, 7)])
def test_the_three_kinds_of_tasks_agree_with_a_loop(saved, tasks, oracle, batch_size, window):
    found, encode = results(saved, tasks, batch_size, window), encoder(saved)
    right = []
    for row, sample in zip(QUESTIONS, found["samples"]["choices"], strict=True):
        sums = []
        for choice, ((value, greedy),) in zip(row["choices"], sample["resps"], strict=True):
            given = encode(row["question"])
            scored = encode(row["question"] + " " + choice)[len(given) :]
            logs, likeliest = oracle(given, scored)
            assert value == pytest.approx(sum(logs), rel=1e-4)
            assert greedy == (likeliest == scored)
            sums.append(sum(logs))
        right.append(sums.index(max(sums)) == row["answer"])
    assert found["results"]["choices"]["acc,none"] == pytest.approx(sum(right) / len(right))
    nats = 0.0
    first = encode("\n" if not (saved / "tokenizer.json").exists() else EOT)
    assert len(first) == 1
    for row, sample in zip(TEXTS, found["samples"]["rolling"], strict=True):
        logs, _ = oracle(first, encode(row["text"]))
        assert sample["resps"][0][0] == pytest.approx(sum(logs), rel=1e-4)
        nats -= sum(logs)
    count = sum(len(row["text"].encode()) for row in TEXTS)
    assert found["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(nats / count / math.log(2), rel=1e-4)


def test_generation_is_greedy_and_ends_where_the_task_says(saved, tasks, oracle):
    encode, tokenizer = encoder(saved), text_tokenizer(saved, load_model(saved).config)
    ended = 0
    found = {size: results(saved, tasks, size)["samples"]["continued"] for size in (1, 3)}
    for k, row in enumerate(PROMPTS):
        ids = encode(row["prompt"])
        for _ in range(9):
            ids = [*ids, oracle(ids, [0])[1][0]]
        whole = tokenizer.decode(ids[len(encode(row["prompt"])) :])
        expected = whole.split("U")[0].split(EOT)[0]
        ended += expected != whole
        assert [samples[k]["resps"][0][0] for samples in found.values()] == [expected] * 2
    assert ended < len(PROMPTS)


def test_a_continuation_that_is_the_likeliest_is_known_as_such(saved, oracle):
    given = encoder(saved)("a b")
    likeliest: list[int] = []
    for _ in range(5):
        likeliest.append(oracle([*given, *likeliest], [0])[1][0])
    other = [*likeliest[:-1], (likeliest[-1] + 1) % 256]
    model = kind()(str(saved), batch_size="2", window=3)
    requests = [(None, given, tokens) for tokens in (likeliest, other, likeliest[:1])]
    values, greedy = zip(*model._loglikelihood_tokens(requests, disable_tqdm=True), strict=True)
    assert greedy == (True, False, True)
    expected = [sum(oracle(given, tokens)[0]) for tokens in (likeliest, other, likeliest[:1])]
    assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_the_command_line_runs_offline(tasks, tmp_path):
    tiny_model().float().save_pretrained(tmp_path / "model")
    command = (
        f"-m parashoot.lm.lm_eval --model parashoot --model_args pretrained={tmp_path / 'model'} --tasks choices "
        f"--include_path {tasks} --batch_size 2 --output_path {tmp_path / 'out'}"
    )
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(  # noqa: PLW1510
        [sys.executable, *command.split()], env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (file,) = (tmp_path / "out").rglob("results*.json")
    found, here = json.loads(file.read_text()), results(tmp_path / "model", tasks, 2)
    assert found["results"]["choices"]["acc,none"] == here["results"]["choices"]["acc,none"]


def test_the_documented_tasks_exist():
    page = (SRC.parent / "docs" / "training.md").read_text()
    (tasks,) = re.findall(r"--tasks (\S+)", page)
    known = importlib.import_module("lm_eval.tasks").TaskManager().all_tasks
    assert set(tasks.split(",")) - set(known) == set()


def test_misuse_is_explained(saved, tmp_path):
    with pytest.raises(ArgumentError, match="batch_size"):
        kind()(str(saved), batch_size="auto")
    with pytest.raises(ArgumentError, match="window"):
        kind()(str(saved), window=0)
    with pytest.raises(ArgumentError, match="directory of a run"):
        kind()(str(tmp_path / "none"))


def test_generation_without_a_word_on_sampling_is_greedy(saved):
    """As of coqa and drop."""
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

    model = kind()(pretrained=str(saved))
    made = [
        model.generate_until(
            [Instance("generate_until", {}, ("a cat ", {"until": ["\n"], "max_gen_toks": 5, **more}), 0)]
        )
        for more in ({}, {"do_sample": False})
    ]
    assert made[0] == made[1]
