"""The command line: `parashoot train`, `generate`, `verify`, `explain`, `bench`. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PROMPT = "The state of the Union is"
DTYPES = ("float64", "float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 if a check or a training failed, 2 for a wrong use, 130 if interrupted."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as e:
        return int(e.code or 0)
    if os.getcwd() not in sys.path:  # so that module:attribute finds a cell in the current directory
        sys.path.append(os.getcwd())
    from . import errors as known

    wrong = known.ArgumentError, known.ArgumentTypeError, known.BackendError, known.CellError, known.StructureError
    try:
        return options.run(options)
    except (*wrong, known.MissingPackageError, known.DivergedError, OSError) as e:
        print(f"parashoot {options.command}: {' '.join(str(e).split())}", file=sys.stderr)
        return 1 if isinstance(e, known.DivergedError) else 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parashoot", description="Nonlinear RNNs, trained in parallel over the sequence."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a byte-level language model", description=_train.__doc__)
    train.add_argument("name", metavar="NAME_OR_JSON", help="'demo', or a JSON file of TrainConfig fields")
    train.add_argument("--resume", metavar="DIR", help="continue the run in this directory")
    train.add_argument("--out", metavar="DIR", help="directory of the run (default: runs/NAME)")
    train.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    train.add_argument("--steps", type=int, metavar="N", help="number of updates, instead of the configuration's")
    train.add_argument("--text", metavar="FILE", help="text to train on, instead of the shipped corpus")
    train.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    train.set_defaults(run=_train)

    generate = commands.add_parser(
        "generate", help="continue a prompt with a trained model", description=_generate.__doc__
    )
    generate.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="checkpoint.pt, or a saved model's directory"
    )
    generate.add_argument("--prompt", default=PROMPT, metavar="TEXT")
    generate.add_argument("--tokens", type=int, default=400, metavar="N", help="bytes to produce (default: 400)")
    generate.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest (default: 0.8)"
    )
    generate.add_argument(
        "--top-k", type=int, default=40, metavar="K", help="sample among the K likeliest (default: 40)"
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N")
    generate.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    generate.set_defaults(run=_generate)

    cell = "a shipped name, module:attribute, or path/to/file.py:attribute"
    verify = commands.add_parser("verify", help="check a cell against the for-loop", description=_verify.__doc__)
    verify.add_argument("cell", nargs="?", metavar="CELL", help=f"{cell} (default: all shipped cells)")
    verify.add_argument(
        "--sigma", type=float, default=1.0, metavar="X", help="scale of the random recurrent weights (default: 1)"
    )
    verify.set_defaults(run=_verify)
    explain = commands.add_parser(
        "explain", help="say how a cell would run at a shape, and why", description=_explain.__doc__
    )
    explain.add_argument("cell", metavar="CELL", help=cell)
    explain.set_defaults(run=_explain)
    for command, shape in ((verify, (256, 32, 2)), (explain, (4096, 256, 1))):
        for name, default in zip(("time", "channels", "batch"), shape, strict=True):
            command.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
        command.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")

    bench = commands.add_parser(
        "bench", help="measure against the loop and other people's kernels", description=_bench.__doc__
    )
    bench.add_argument(
        "suites", nargs="*", metavar="SUITE", help="quick, table, peers, paper, time, width (default: quick)"
    )
    bench.add_argument(
        "--out", default="bench.jsonl", metavar="FILE", help="rows are added here (default: bench.jsonl)"
    )
    bench.add_argument("--contestants", metavar="A,B", help="only these, instead of the suite's own")
    bench.add_argument("--repeats", type=int, default=20, metavar="N", help="samples of each time (default: 20)")
    bench.add_argument("--minutes", type=float, default=float("inf"), metavar="X", help="begin nothing after that long")
    bench.add_argument("--device", help="cpu or cuda (default: a GPU if there is one)")
    bench.add_argument("--commit", metavar="HASH", help="what the rows call this version (default: git's)")
    bench.add_argument(
        "--render", metavar="FILE", help="measure nothing: make the tables and plots of this results file"
    )
    bench.add_argument(
        "--readme", default="README.md", metavar="FILE", help="where --render puts them (default: README.md)"
    )
    bench.set_defaults(run=_bench)
    return parser


def _train(options: argparse.Namespace) -> int:
    """Train a byte-level language model. Ctrl-C saves a checkpoint; --resume continues from it exactly."""
    from dataclasses import replace

    from .errors import bad_value
    from .lm import checkpoint
    from .lm.presets import find_training
    from .lm.report import introduce, report
    from .lm.train import train
    from .lm.train_config import TrainConfig

    name, config = find_training(options.name)
    if options.resume is not None:
        for flag in ("out", "overwrite", "steps", "text"):
            if getattr(options, flag):
                bad_value(
                    f"--{flag}",
                    f"{getattr(options, flag)!r} with --resume",
                    "neither or one of them",
                    "A resumed run keeps its own.",
                )
        directory = Path(options.resume)
        if not (directory / checkpoint.NAME).is_file():
            bad_value(
                "--resume",
                f"'{directory}'",
                f"a directory with a {checkpoint.NAME}",
                f"Start with: parashoot train {options.name}",
            )
        saved = TrainConfig.from_dict(checkpoint.load(directory / checkpoint.NAME)["config"])
        if saved.model != config.model:
            bad_value("NAME_OR_JSON", f"'{options.name}'", f"the model of the run in {directory}")
        config = saved
    else:
        directory = Path(options.out or Path("runs") / name)
        if (directory / checkpoint.NAME).exists() and not options.overwrite:
            bad_value(
                "--out",
                f"'{directory}', which holds a run",
                "a new directory",
                f"Continue that run with --resume {directory}, or lose it with --overwrite.",
            )
        changes = {k: getattr(options, k) for k in ("steps", "text") if getattr(options, k) is not None}
        config = replace(config, **changes)
    again = f"parashoot train {options.name} --resume {directory}"
    try:
        run = train(
            config, directory, resume=options.resume is not None, overwrite=options.overwrite, device=options.device,
            on_start=lambda run: print(introduce(run), flush=True),
        )  # fmt: skip
        if not run.interrupted:
            report(run, PROMPT)
            return 0
        print(f"\nStopped after step {run.step} of {config.steps}; nothing is lost. Continue with:\n  {again}")
    except KeyboardInterrupt:
        print(f"\nInterrupted. Continue from the last checkpoint with:\n  {again}")
    return 130


def _generate(options: argparse.Namespace) -> int:
    """Continue a prompt with a trained model, printed as it is made."""
    import torch

    from .lm.checkpoint import load_model
    from .lm.generate import generate_text

    model = load_model(options.checkpoint, options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(options.prompt, end="", flush=True)
    generate_text(
        model, options.prompt, options.tokens, temperature=options.temperature, top_k=options.top_k, seed=options.seed,
        on_text=lambda piece: print(piece, end="", flush=True),
    )  # fmt: skip
    print()
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Compare a cell's parallel pass and its gradients with the for-loop on random inputs; exit code 1 if they disagree."""
    from . import cells
    from .cells.find import find_cell
    from .diagnostics import verify

    chosen = [options.cell] if options.cell else cells.__all__
    passed = True
    for name in chosen:
        cell = find_cell(name, argument="CELL", files=True)
        found = verify(cell, *_problem(cell, options))
        print(found, end="\n\n" if name != chosen[-1] else "\n")
        passed = passed and found.passed
    return 0 if passed else 1


def _explain(options: argparse.Namespace) -> int:
    """Say how ps.scan would run a cell at a shape, and why."""
    from .cells.find import find_cell
    from .scan import explain

    cell = find_cell(options.cell, argument="CELL", files=True)
    print(explain(cell, _problem(cell, options)[0]))
    return 0


def _bench(options: argparse.Namespace) -> int:
    """Time cells forward and backward, each row with its error against the fp64 loop. Ctrl-C keeps what was measured."""
    from .bench.results import render
    from .bench.run import run

    if options.render:
        return render(Path(options.render), Path(options.readme))
    return run(
        options.suites, Path(options.out), device=options.device, contestants=options.contestants, repeats=options.repeats,
        minutes=options.minutes, commit=options.commit,
    )  # fmt: skip


def _problem(cell, options: argparse.Namespace) -> tuple:
    """Random x (B, T, G, C) and parameters of deviation sigma (matrices: sigma / sqrt(n)) for a cell."""
    import torch

    from .cell import parameter_shapes
    from .errors import bad_value

    for name in ("time", "channels", "batch"):
        if getattr(options, name) < 1:
            bad_value(f"--{name}", str(getattr(options, name)), "an integer >= 1")
    if cell.width and options.channels % cell.width:
        bad_value(
            "--channels", str(options.channels), f"a multiple of the head width {cell.width} of cell '{cell.name}'"
        )
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, options.dtype)
    x = torch.randn(options.batch, options.time, len(cell.inputs), options.channels, generator=generator)
    sigma = getattr(options, "sigma", 1.0)
    shapes = parameter_shapes(cell, options.channels)
    params = [torch.randn(s, generator=generator) * sigma / (s[-1] ** 0.5 if len(s) > 1 else 1.0) for s in shapes]
    return x.to(dtype), tuple(p.to(dtype) for p in params) or None
