"""`parashoot tasks list`, `show`, `run` and `render`: their arguments, and what they do."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from pathlib import Path

from ..errors import bad_value
from . import TASKS
from .task import find_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of `parashoot tasks`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="the tasks, what each asks, and its options").set_defaults(run=_list)
    show = actions.add_parser("show", help="samples of a task in words")
    add = show.add_argument
    add("task", metavar="TASK")
    add("options", nargs="*", metavar="OPTION=VALUE", help="options of the task, such as n=3")
    add("--length", type=int, default=24, metavar="N", help="(default: 24)")
    add("--samples", type=int, default=1, metavar="N", help="(default: 1)")
    add("--seed", type=int, default=0, metavar="N")
    show.set_defaults(run=_show)
    run = actions.add_parser("run", help="train and test the models of a suite; goes on where it was stopped")
    add = run.add_argument
    suites = "paper, recall, tracking, words, cycle, arithmetic, brackets, quick, or a JSON file"
    add("suite", nargs="?", default="paper", metavar="SUITE", help=suites)
    add("--out", default="tasks.jsonl", metavar="FILE", help="a row is added for each run (default: tasks.jsonl)")
    add(
        "--minutes", type=float, default=math.inf, metavar="N",
        help="the most that one training takes; its row says if it was cut off, and counts as run",
    )  # fmt: skip
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    run.set_defaults(run=_run)
    render = actions.add_parser("render", help="tables and a plot of a results file")
    render.add_argument("file", metavar="FILE")
    render.set_defaults(run=_render)


def _list(options: argparse.Namespace) -> int:
    for task in TASKS.values():
        given = " ".join(f"{name}={json.dumps(value)}" for name, value in task.options.items())
        print(f"{task.name:15} {task.about}" + (f"  [{given}]" if given else ""))
    return 0


def _show(options: argparse.Namespace) -> int:
    task, given = find_task(options.task), {}
    for pair in options.options:
        name, _, value = pair.partition("=")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            bad_value("OPTION=VALUE", repr(pair), "a name and a number, true, false or null, such as n=3")
    if options.samples < 1:
        bad_value("--samples", str(options.samples), "an integer >= 1")
    samples = task.build(options.seed, length=options.length, **given)
    print(task.about)
    for k in range(options.samples):
        print(samples.show(k))
    return 0


def _run(options: argparse.Namespace) -> int:
    from .report import render
    from .run import run
    from .suite import find_suite

    try:
        rows = run(find_suite(options.suite), Path(options.out), device=options.device, minutes=options.minutes)
    except KeyboardInterrupt:
        rest = [] if math.isinf(options.minutes) else ["--minutes", f"{options.minutes:g}"]
        rest += [] if options.device is None else ["--device", options.device]
        again = shlex.join(["parashoot", "tasks", "run", options.suite, "--out", options.out, *rest])
        print(f"\nStopped; finished runs are in {options.out}. Continue with:\n  {again}")
        return 130
    render(rows, Path(options.out))
    return 0


def _render(options: argparse.Namespace) -> int:
    from .report import render
    from .run import read

    render(read(Path(options.file)), Path(options.file))
    return 0
