"""Suites: that they teach what they should, their results file, tables and errors, and the commands of docs/tasks.md."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
import parashoot as ps
from parashoot.bench.rows import add_rows
from parashoot.cli import main
from parashoot.errors import ArgumentError, ArgumentTypeError
from parashoot.tasks import run as runner
from parashoot.tasks.models import SOLVERS, build_model
from parashoot.tasks.report import picked, tables
from parashoot.tasks.run import evaluate, read, run, train
from parashoot.tasks.step import TOGETHER, Batches, Update
from parashoot.tasks.suite import SUITES, Trial, find_suite, trials
from parashoot.tasks.task import IGNORED

DOCS = Path(__file__).parents[1] / "docs"
CPU = torch.device("cpu")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=on_gpu)]
TINY = {
    "length": 6, "test_lengths": [6, 9], "steps": 4, "validate_every": 2, "hidden_size": 8, "batch_size": 4,
    "train_samples": 10, "validation_samples": 8, "test_samples": 8,
}  # fmt: skip


def suite(**fields) -> list[Trial]:
    return trials({"defaults": TINY, "runs": [fields]})


@pytest.mark.parametrize("seed", range(3))
def test_nonlinear_cells_learn_parity_and_a_linear_one_with_positive_gates_does_not(seed):
    quick = [t for t in find_suite("quick") if t.task == "parity"]
    found = {t.model: train(Trial(**{**t.to_dict(), "seed": seed}), CPU) for t in quick}
    for model in ("cell:gru", "cell:lstm"):
        assert found[model]["stopped"] == "perfect"
        assert found[model]["test"]["64"]["token"] > 0.99  # four times the training length
    assert found["cell:mingru"]["test"]["16"]["token"] < 0.75
    assert found["cell:mingru"]["test"]["64"]["last"] < 0.6


def test_lstm_keeps_the_first_token():
    (trial,) = (t for t in find_suite("quick") if t.task == "keep_nth" and t.model == "cell:lstm")
    assert train(trial, CPU)["test"]["16"]["token"] > 0.99


def test_a_rotor_learns_to_compose_permutations_far_beyond_its_training_and_a_linear_cell_does_not():
    found = {t.model: train(t, CPU) for t in find_suite("quick") if t.task == "s3"}
    rotor, linear = found["cell:headrotor"], found["cell:mingru"]
    lengths = [point["length"] for point in rotor["curve"]]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] == 16  # the curriculum moves on, and ends
    assert rotor["metric"] == "sequence" and rotor["steps"] == 400 and rotor["validation"] == 1.0  # no early stop
    assert rotor["test"]["64"]["sequence"] > 0.99  # all answers of a sequence, at four times the training length
    assert linear["test"]["64"]["sequence"] < 0.01 and linear["curve"][-1]["length"] < 16


def test_sweeps_are_counted_at_a_length_of_their_own():
    found = [Trial("s3", "cell:headlstm", **{**TINY, "probe": probe}) for probe in (None, 64)]
    own, probed = (train(trial, CPU) for trial in found)
    assert own["test"] == probed["test"]  # it leaves no trace
    assert {point["solver"]["iterations"] for point in own["curve"]} == {1.0}  # 6 steps are one chunk
    model = build_model(
        "cell:headlstm", 6, hidden_size=8, num_layers=1, num_heads=1, recurrent_clip=None, solver="parallel"
    )
    x = Trial("s3", "cell:headlstm", **TINY).samples("validation", 64).batch(0, 4)[0]
    with torch.no_grad():
        cell, z, params = model.rnn.prepared(model.embed(x))
        want = ps.scan(cell, z, params, solver=runner.PROBED, return_info=True)[2].iterations
    probe = runner._probed(model, x)
    assert probe["iterations"] == want > 1 and probe["speedup"] > 0
    assert all(p.grad is None for p in model.parameters())
    assert model.rnn.solver is None and all(point["solver"]["iterations"] > 1 for point in probed["curve"])


def test_solvers_train_alike(monkeypatch):
    monkeypatch.setitem(
        SOLVERS, "parallel", ps.MultipleShooting(chunk_length=5)
    )  # by itself so small a problem is not cut
    made = [Trial("parity", "cell:lstm", **{**TINY, "length": 40, "solver": name}) for name in SOLVERS]
    rows = [train(trial, CPU) for trial in made]
    both = [[point["solver"] for point in row["curve"]] for row in rows]
    for ours, loops in zip(*(row["curve"] for row in rows), strict=True):
        assert ours["loss"] == pytest.approx(loops["loss"], rel=1e-4)
        assert ours["solver"]["lyapunov"] == pytest.approx(loops["solver"]["lyapunov"], abs=1e-3)
    assert min(point["iterations"] for point in both[0]) > 1 == max(point["iterations"] for point in both[1])
    assert set(both[0][-1]) == {"iterations", "iterations_mean", "defect", "lyapunov"}


@pytest.mark.parametrize(
    "model", ["cell:gru", "block:lstm", "cell:parashoot.tasks.cells:mingru_negative", "torch:gru", "torch:lstm"]
)
def test_models_are_causal(model):
    made = build_model(
        model, 10, hidden_size=8, num_layers=1, num_heads=1, recurrent_clip=None, solver="parallel"
    ).eval()
    ids = torch.randint(10, (2, 12))
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 10
    with torch.no_grad():
        a, b = made(input_ids=ids).logits, made(input_ids=changed).logits
    assert a.shape == (2, 12, 10)
    assert torch.allclose(a[:, :7], b[:, :7], atol=1e-6) and not torch.allclose(a[:, 7:], b[:, 7:])


@pytest.mark.parametrize("model", ["cell:gru", "block:gru"])
def test_an_initial_bias_reaches_all_layers(model):
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 1, "recurrent_clip": None, "solver": "parallel"}
    made = []
    for bias in (None, {"r": -2.0, "c": 0.5}):
        torch.manual_seed(0)
        made.append(build_model(model, 10, **sizes, initial_bias=bias).state_dict())
    changed = {name for name in made[0] if not made[0][name].equal(made[1][name])}
    assert len(changed) == 2
    for name in changed:
        added = made[1][name] - made[0][name]
        assert added.equal(torch.tensor([0.0, -2.0, 0.5])[:, None].expand(3, 8))  # z, r, c


def test_initial_recurrent_numbers_are_added_to_the_parameters_of_all_layers():
    sizes = {"hidden_size": 8, "num_layers": 2, "num_heads": 1, "recurrent_clip": None, "solver": "parallel"}
    made = []
    for numbers in (None, {"a_c": 0.5, "a_z": -2.0}):
        torch.manual_seed(0)
        made.append(build_model("cell:gru", 10, **sizes, initial_recurrent=numbers).state_dict())
    changed = {name for name in made[0] if not made[0][name].equal(made[1][name])}
    assert changed == {"rnn.weight_hh_l0", "rnn.weight_hh_l1"}
    for name in changed:
        want = torch.tensor([-2.0, 0.0, 0.5])[:, None].expand(3, 8)  # a_z, a_r, a_c
        assert torch.allclose(made[1][name] - made[0][name], want)


def test_an_evaluation_does_not_depend_on_its_batches(monkeypatch):
    trial = Trial("parity", "cell:gru", **TINY)
    model = build_model("cell:gru", 2, hidden_size=8, num_layers=1, num_heads=1, recurrent_clip=None, solver="parallel")
    whole = evaluate(model, trial.samples("test", 9), 50, CPU)
    for name, few in (("LOGITS", 9 * 2 * 7), ("POSITIONS", 9 * 3)):
        monkeypatch.setattr(runner, name, few)
        assert evaluate(model, trial.samples("test", 9), 50, CPU) == whole
    assert model.training


def test_a_fixed_set_is_taken_whole_each_epoch():
    trial = Trial("parity", "cell:gru", **{**TINY, "length": 12, "train_samples": 12})
    data, batches = trial.samples("train", 12), Batches(trial, CPU)
    every = sorted(data.batch(0, 12)[0].tolist())
    epochs = [torch.cat([batches(data, 3 * e + k)[0] for k in range(3)]).tolist() for e in range(3)]
    assert all(sorted(e) == every for e in epochs)
    assert epochs[0] != epochs[1]


def test_new_samples_come_in_their_order_whichever_were_drawn_together():
    trial = Trial("khop", "cell:gru", **{**TINY, "train_samples": None})
    short, long = trial.samples("train", 6), trial.samples("train", 9)
    batches = Batches(trial, CPU)
    for data, step in ((short, 0), (short, 1), (short, 2 * TOGETHER + 3), (long, 2 * TOGETHER + 4), (short, 1)):
        for got, want in zip(batches(data, step), data.batch(4 * step, 4), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_an_update_is_a_step_of_adamw_with_a_cosine(device):
    trial = Trial("parity", "cell:gru", **{**TINY, "steps": 8, "learning_rate": 3e-2, "weight_decay": 0.1})
    data, found = trial.samples("train", 6), []
    for ours in (True, False):
        torch.manual_seed(0)
        model = build_model(
            "cell:gru", 2, hidden_size=8, num_layers=1, num_heads=1, recurrent_clip=None, solver="parallel"
        )
        model.to(device)
        update, optimizer = (
            Update(model, trial, device),
            torch.optim.AdamW(model.parameters(), lr=3e-2, weight_decay=0.1),
        )
        schedule, losses = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8), []
        for step in range(8):
            x, y = (v.to(device) for v in data.batch(4 * step, 4))
            if ours:
                loss, last = update(x, y, trial.learning_rate_at(step))
            else:
                logits = model(input_ids=x).logits
                last = (logits[:, -1].argmax(-1) == y[:, -1]).float().mean()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            losses += [loss.detach(), last]
        found.append([torch.stack(losses), *model.parameters()])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_suite_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    out, made = tmp_path / "deep" / "rows.jsonl", suite(task="parity", models=["cell:gru", "torch:rnn"], seeds=[0, 1])
    ran: list[str] = []

    def recorded(trial, *rest):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(trial.key)
        return train(trial, *rest)

    monkeypatch.setattr(runner, "train", recorded)
    with pytest.raises(KeyboardInterrupt):
        run(made, out, device="cpu")
    with out.open("a") as file:
        file.write('{"trial": {"ta')  # a line that was cut off
    assert len(read(out)) == 2
    monkeypatch.setattr(runner, "train", train)
    rows = run(made, out, device="cpu")
    assert [row["trial"]["model"] for row in rows] == ["cell:gru", "torch:rnn"] * 2
    before = out.read_bytes()
    assert run(made, out, device="cpu") == rows == read(out) and out.read_bytes() == before
    again = train(made[0], CPU)
    assert again["test"] == rows[0]["test"] and again["curve"] == rows[0]["curve"]
    assert {"commit", "device", "versions"} <= set(rows[0])


def test_rates_are_picked_on_validation_and_left_out_after_a_perfect_one(tmp_path, monkeypatch):
    made = suite(task="parity", models=["cell:gru"], learning_rates=[0.1, 0.2, 0.3], seeds=[0, 1])
    scores = {(0, 0.1): 0.5, (0, 0.2): 1.0, (1, 0.1): 0.7, (1, 0.2): 0.6, (1, 0.3): 0.8}

    def graded(trial, *_):
        score = scores[trial.seed, trial.learning_rate]
        test = {n: {"token": score - 0.1, "last": 0.0, "sequence": 0.0} for n in ("6", "9")}
        facts = {"metric": "token", "curve": [], "seconds": 1.0, "steps": 4, "parameters": 9, "stopped": "steps"}
        return {"trial": trial.to_dict(), "validation": score, "test": test, **facts}

    monkeypatch.setattr(runner, "train", graded)
    rows = run(made, out := tmp_path / "rows.jsonl", device="cpu")
    assert [row["validation"] for row in rows] == list(scores.values())
    assert [row["trial"]["learning_rate"] for row in picked(rows)] == [0.2, 0.3]
    text = tables(rows)
    assert "| parity, 6, by token | 9         | 90.0 (80.0) |" in text
    assert "0.2 0.3" in text and "cut off |" not in text
    cells = [
        {**row, "trial": {**row["trial"], "model": f"cell:{name}:mine"}} for row in rows[:1] for name in ("a", "b")
    ]
    assert [row["model"] for row in picked(cells)] == ["cell a:mine", "cell b:mine"]
    longer = [{**rows[0], "trial": {**rows[0]["trial"], "steps": n, "validate_every": n}} for n in (4, 8)]
    assert [row["title"] for row in picked(longer)] == ["parity, 6, by token, steps 4", "parity, 6, by token, steps 8"]
    elsewhere = [{**rows[0], "device": "another"}, {**rows[4], "device": "one", "stopped": "time"}]
    costs = tables(elsewhere).split("\n\n")[1]
    assert "another |" in costs and "4 (1 cut off) |" in costs and len(costs.splitlines()) == 4
    with out.open("a") as file:
        file.write(json.dumps({**rows[0], "validation": 0.0}))  # once more, and worse, without an end of line
    assert [row["validation"] for row in read(out)] == [0.0, *list(scores.values())[1:]]
    add_rows(out, [{**rows[0], "validation": 0.25}])
    assert len(out.read_text().splitlines()) == 7 and read(out)[0]["validation"] == 0.25


def test_a_training_that_diverges_is_a_row(monkeypatch):
    row = train(Trial("parity", "torch:rnn", **{**TINY, "learning_rate": 1e30, "steps": 30}), CPU)
    assert row["stopped"] in ("diverged", "steps") and 0 <= row["validation"] < 1
    assert json.loads(json.dumps(row)) == row


def test_a_training_ends_in_time_and_its_row_says_so(tmp_path):
    out, made = tmp_path / "rows.jsonl", suite(task="parity", model="cell:gru", steps=1000, validate_every=1000)
    (row,) = run(made, out, device="cpu", minutes=1e-9)
    assert row["stopped"] == "time" and row["steps"] == 1 and set(row["test"]) == {"6", "9"}
    assert [point["step"] for point in row["curve"]] == [1] and row["validation"] == row["curve"][0]["validation"]
    (again,) = run(made, out, device="cpu")
    assert again == row
    (last,) = run(suite(task="parity", model="cell:gru", steps=1), out, device="cpu", minutes=1e-9)
    assert last["stopped"] == "steps"  # it was at its end
    with pytest.raises(ArgumentError, match="minutes: got 0; expected a number > 0"):
        run(made, out, device="cpu", minutes=0)


def test_the_suites_are_well_formed():
    for name in SUITES:
        found = find_suite(name)
        assert len({trial.key for trial in found}) == len(found)
        for trial in found:
            build_model(
                trial.model, 12, hidden_size=8, num_layers=1, num_heads=1, recurrent_clip=None, solver="parallel"
            )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task": "fly", "model": "cell:gru"}, "task: got 'fly'; expected one of keep_nth"),
        ({"task": "parity", "models": []}, "models: got []; expected a list"),
        ({"task": "parity", "model": "gru"}, "model: got 'gru'; expected 'cell:CELL'"),
        ({"task": "parity", "model": "cell:gruu"}, "model: got 'gruu'; expected one of elman"),
        ({"task": "parity", "model": "torch:slstm"}, "model: got 'torch:slstm'"),
        ({"task": "parity", "model": "cell:gru", "lenght": 3}, "unknown field 'lenght'"),
        ({"task": "parity"}, "no model"),
        ({"task": "parity", "model": "cell:gru", "steps": 0}, "steps: got 0"),
        ({"task": "parity", "model": "cell:gru", "train_samples": 2}, "train_samples: got 2"),
        (
            {"task": "parity", "model": "cell:gru", "curriculum": [2]},
            "train_samples: got 10; expected None where there is a curriculum",
        ),
        ({"task": "parity", "model": "cell:gru", "curriculum": 2}, "curriculum: got 2; expected a list"),
        (
            {"task": "parity", "model": "cell:gru", "metric": "all"},
            "metric: got 'all'; expected None or one of token, sequence, last",
        ),
        ({"task": "parity", "model": "cell:gru", "probe": 0}, "probe: got 0"),
        (
            {"task": "parity", "model": "cell:gru", "learned": 1},
            "learned: got 1; expected a finite number >= 0 and < 1",
        ),
        ({"task": "parity", "model": "cell:gru", "stop_early": 1}, "stop_early: got int 1"),
        ({"task": "parity", "model": "cell:gru", "initial_bias": 3}, "initial_bias: got int 3"),
        (
            {"task": "parity", "model": "cell:gru", "initial_bias": {"f": 3}},
            "initial_bias: got 'f'; expected one of z, r, c, the inputs of cell 'gru'",
        ),
        (
            {"task": "parity", "model": "torch:gru", "initial_bias": {"z": 3}},
            "initial_bias: got {'z': 3}; expected none for torch:gru",
        ),
        ({"task": "parity", "model": "cell:gru", "initial_bias": {"z": math.nan}}, "initial_bias of z: got nan"),
        (
            {"task": "parity", "model": "cell:headgru", "initial_recurrent": {"R_z": 3}},
            "initial_recurrent: got 'R_z'; expected one of none, the vectors of parameters of cell:headgru",
        ),
        ({"task": "parity", "model": "cell:gru", "solver": "fast"}, "solver: got 'fast'"),
        ({"task": "parity", "model": "cell:gru", "shortest": 3}, "option of parity: got 'shortest'"),
        ({"task": "parity", "model": "cell:gru", "test_lengths": []}, "test_lengths: got []"),
        ({"task": "parity", "model": "cell:gru", "learning_rate": -1}, "learning_rate: got -1"),
        ({"task": "parity", "model": "cell:gru", "options": 3}, "options: got int 3"),
        (
            {"task": "cycle", "model": "cell:gru", "shortest": 3, "options": {"shortest": 3}},
            "options: got shortest, which the trial has, too",
        ),
        ({"task": "keep_nth", "model": "cell:gru", "test_lengths": [3]}, "length: got 3; expected at least 5"),
    ],
)
def test_a_suite_that_is_wrong_says_why(fields, words):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=re.escape(words)):
        suite(**fields)


def test_the_command_line_reports_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("rows.jsonl").write_text('{"trial": 3}\n{"trial": 3}\n')
    wrong = {
        "run nothing": "SUITE: got 'nothing'; expected one of paper, tracking, words, arithmetic, cycle, brackets, recall, quick",
        "run broken.json": "which is not JSON",
        "render nowhere.jsonl": "FILE: got 'nowhere.jsonl'; expected an existing results file",
        "render rows.jsonl": "line 1",
        "show parity n": "OPTION=VALUE: got 'n'",
        "show fly": "task: got 'fly'",
    }
    for command, words in wrong.items():
        assert main(["tasks", *command.split()]) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("parashoot tasks: ") and error.count("\n") == 1


def test_every_command_of_the_page_runs(tmp_path, monkeypatch, capsys):
    page = (DOCS / "tasks.md").read_text()
    monkeypatch.chdir(tmp_path)
    (given,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    values = json.loads(given)
    assert trials(values)
    Path("mine.json").write_text(
        json.dumps({"runs": [{**r, **TINY, "seeds": [0]} for r in values["runs"]], "defaults": values["defaults"]})
    )
    small = {name: {"defaults": {}, "runs": [{"task": "parity", "model": "cell:gru", **TINY}]} for name in SUITES}
    monkeypatch.setattr("parashoot.tasks.suite.SUITES", small)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 6
    for line in commands:
        assert main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert Path("mine.png").exists() and Path("mine-training.png").exists()
    exec(compile("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), "tasks.md", "exec"), {})


def test_what_no_model_can_be_is_said_before_the_first_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "train", lambda *_: pytest.fail("trained"))
    for fields, words in (
        ({"model": "cell:gru", "num_heads": 3}, "num_heads: got 3; expected a divisor of hidden_size = 8"),
        ({"model": "block:attention", "num_heads": 3}, "num_heads: got 3; expected a divisor of hidden_size = 8"),
        ({"model": "cell:lstm", "recurrent_clip": -1}, "recurrent_clip: got -1"),
    ):
        made = [*suite(task="parity", model="cell:gru"), *suite(task="parity", **fields)]
        with pytest.raises(ArgumentError, match=words):
            run(made, tmp_path / "rows.jsonl", device="cpu")
    assert not list(tmp_path.iterdir())


def test_what_another_process_has_done_meanwhile_is_not_done_again(tmp_path, monkeypatch):
    made, out, real, trained = (
        suite(task="parity", model="cell:gru", seeds=[0, 1, 2]),
        tmp_path / "rows.jsonl",
        train,
        [],
    )

    def beside(trial, *rest):
        trained.append(trial.seed)
        row = real(trial, *rest)
        if trial.seed == 0:
            add_rows(out, [{**row, "trial": made[1].to_dict(), "validation": 0.5}])
        return row

    monkeypatch.setattr(runner, "train", beside)
    rows = run(made, out, device="cpu")
    assert trained == [0, 2] and sorted(row["trial"]["seed"] for row in rows) == [0, 1, 2]


def test_titles_of_trials_with_other_fields_differ():
    row = {"test": {}, "metric": "token", "validation": 0.0, "trial": Trial("parity", "cell:gru", **TINY).to_dict()}
    newer = {**row, "trial": {**row["trial"], "new": 1}}
    for rows in ([row, newer], [newer, row]):
        assert {r["title"] for r in picked(rows)} == {"parity, 6, by token, new null", "parity, 6, by token, new 1"}


def test_a_batch_in_which_nothing_is_asked_teaches_nothing():
    trial = Trial("parity", "cell:gru", **TINY)
    model = build_model("cell:gru", 2, hidden_size=8, num_layers=1, num_heads=1, recurrent_clip=None, solver="parallel")
    update, x = Update(model, trial, torch.device("cpu")), torch.zeros(4, 8, dtype=torch.int64)
    loss, last = update(x, torch.full_like(x, IGNORED), 1e-2)
    assert (float(loss), float(last)) == (0.0, 0.0)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    loss, _ = update(x, torch.where(torch.arange(8) == 7, 0, IGNORED).expand(4, 8), 1e-2)
    assert float(loss) > 0
