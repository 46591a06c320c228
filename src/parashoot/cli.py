"""The command line: `parashoot data`, `train`, `eval`, `generate`, `export`, `verify`, `explain`, `bench`, `tasks`. What a command needs is imported when it runs."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROMPT = "The state of the Union is"
DTYPES = ("float64", "float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 if a check or a training failed, 2 for a wrong use, 130 if interrupted."""
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as e:
        return int(e.code or 0)
    for stream in (sys.stdout, sys.stderr):  # a sample or a path may hold what a terminal has no character for
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")
    if os.getcwd() not in sys.path:  # so that module:attribute finds a cell in the current directory
        sys.path.append(os.getcwd())
    from . import errors

    wrong = (
        errors.ArgumentError,
        errors.ArgumentTypeError,
        errors.BackendError,
        errors.CellError,
        errors.StructureError,
        errors.MissingPackageError,
    )
    failed = (errors.DivergedError, errors.CheckpointError)
    try:
        return options.run(options)
    except (*wrong, *failed, OSError) as e:
        print(f"parashoot {options.command}: {' '.join(str(e).split())}", file=sys.stderr)
        return 1 if isinstance(e, failed) else 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="parashoot", description="Nonlinear RNNs, trained in parallel over the sequence."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> Callable[..., Any]:
        """A further command; what adds arguments to it."""
        made = commands.add_parser(name, help=about, description=run.__doc__)
        made.set_defaults(run=run)
        return made.add_argument

    add = command("data", _data, "turn text into token shards to train on")
    add("out", metavar="OUT", help="a new directory for the shards")
    add("name", nargs="?", choices=["enwik8"], help="a corpus by name")
    add("--text", nargs="+", metavar="FILE", help="files of text, each a document; splits by position")
    add("--jsonl", nargs="+", metavar="FILE", help="files with a JSON object a line; splits by content")
    add("--hf", metavar="NAME", help="a Hugging Face data set; splits by content")
    add("--check", action="store_true", help="compare the shards in OUT with their SHA-256, and write nothing")
    add("--field", default="text", help="where a document's text is, for --jsonl and --hf (default: text)")
    add("--subset", metavar="NAME", help="the configuration of --hf")
    add("--split", default="train", metavar="NAME", help="the split of --hf to read (default: train)")
    add("--streaming", action="store_true", help="read --hf as it is downloaded, keeping no copy")
    add("--validation", type=float, default=0.05, metavar="X", help="share to validate on (default: 0.05)")
    add("--test", type=float, default=0.0, metavar="X", help="share to test on (default: 0)")
    add("--tokenizer", metavar="FILE", help="a tokenizer.json (default: tokens are bytes)")
    add("--train-bpe", type=int, metavar="VOCAB", help="train a byte-pair encoding of that many tokens")
    add("--eot", metavar="TOKEN", help="the --tokenizer's token that begins documents (<|endoftext|>)")

    add = command("train", _train, "train a language model")
    add("name", metavar="CONFIG", help="'demo', or a JSON file of TrainConfig fields")
    add("--resume", metavar="DIR", help="continue the run in this directory")
    add("--out", metavar="DIR", help="directory of the run (default: runs/NAME)")
    add("--overwrite", action="store_true", help="replace a run that is there")
    add("--steps", type=int, metavar="N", help="number of updates, instead of the configuration's")
    add("--data", metavar="DIR", help="what parashoot data wrote, instead of the configuration's")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")

    add = command("eval", _eval, "bits per byte and perplexity of a split")
    add("checkpoint", metavar="CHECKPOINT", help="the directory of a run, one of its checkpoints, or a saved model")
    add("--data", metavar="DIR", help="what parashoot data wrote (default: what the run trained on)")
    add("--split", default="test", metavar="NAME", help="train, validation or test (default: test)")
    add("--streams", type=int, default=8, metavar="N", help="pieces read side by side (default: 8)")
    add("--window", type=int, default=1024, metavar="N", help="tokens a pass (default: 1024)")
    before = "for a Transformer: tokens before each window (default: as many as it has)"
    add("--context", type=int, metavar="N", help=before)
    lengths = "also the loss by position, in pieces of N tokens (default: 8 times the training length)"
    add("--lengths", type=int, nargs="?", const=0, metavar="N", help=lengths)
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")

    add = command("generate", _generate, "continue a prompt with a trained model")
    add("--checkpoint", required=True, metavar="DIR", help="a run, one of its checkpoints, or a saved model")
    add("--prompt", default=PROMPT, metavar="TEXT")
    add("--tokens", type=int, default=400, metavar="N", help="tokens to produce (default: 400)")
    add("--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest (default: 0.8)")
    add("--top-k", type=int, default=40, metavar="K", help="sample among the K likeliest (default: 40)")
    add("--seed", type=int, default=0, metavar="N")
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")

    add = command("export", _export, "write a checkpoint as a Hugging Face model")
    add("checkpoint", metavar="CHECKPOINT", help="the directory of a run or of one of its checkpoints")
    add("out", metavar="OUT", help="a new directory for the model")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the weights (default: fp32)")

    cell = "a shipped name, module:attribute, or path/to/file.py:attribute"
    verify = add = command("verify", _verify, "check a cell against the for-loop")
    add("cell", nargs="?", metavar="CELL", help=f"{cell} (default: all shipped cells)")
    add("--sigma", type=float, default=1.0, metavar="X", help="scale of the random recurrent weights (default: 1)")
    explain = add = command("explain", _explain, "say how a cell would run at a shape, and why")
    add("cell", metavar="CELL", help=cell)
    for add, shape in ((verify, (256, 32, 2)), (explain, (4096, 256, 1))):
        for name, default in zip(("time", "channels", "batch"), shape, strict=True):
            add(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
        add("--dtype", choices=DTYPES, default="float32", help="(default: float32)")

    add = command("bench", _bench, "measure against the loop and other people's kernels")
    add("suites", nargs="*", metavar="SUITE", help="quick, table, peers, heads, paper, time, width (default: quick)")
    add("--out", default="bench.jsonl", metavar="FILE", help="rows are added here (default: bench.jsonl)")
    add("--cases", default="", metavar="TEXT", help="only cases with this in their names: 'bf16 8 x 2048'")
    add("--contestants", metavar="A,B", help="only these, instead of the suite's own")
    add("--repeats", type=int, default=20, metavar="N", help="samples of each time (default: 20)")
    add("--minutes", type=float, default=float("inf"), metavar="X", help="begin nothing after that long")
    add("--device", help="cpu or cuda (default: a GPU if there is one)")
    add("--commit", metavar="HASH", help="what the rows call this version (default: git's)")
    add("--render", metavar="FILE", help="measure nothing: make the tables and plots of this results file")
    add("--readme", default="README.md", metavar="FILE", help="where --render puts them (default: README.md)")

    from .tasks.command import add_arguments

    tasks = commands.add_parser("tasks", help="synthetic tasks: show them, and train small models on them")
    add_arguments(tasks)
    return parser


def _data(options: argparse.Namespace) -> int:
    """Write text as memory-mapped token shards with document boundaries, for parashoot train and eval."""
    from .errors import bad_value
    from .lm import sources
    from .lm.data import check_data
    from .lm.prepare import check_new, prepare
    from .lm.tokenizer import EOT, Bytes, Subwords

    given = [n for n in ("name", "text", "jsonl", "hf", "check") if getattr(options, n)]
    if len(given) != 1:
        ways = "one of enwik8, --text, --jsonl, --hf, --check"
        bad_value("source", " and ".join(given) or "none", ways, "parashoot data --help shows them.")
    out, shares = Path(options.out), (options.validation, options.test)
    if options.check:
        print(f"{check_data(out)} files of {out} are as its index says.")
        return 0
    check_new(out)
    if not (min(shares) >= 0 and sum(shares) < 1):
        bad_value(
            "--validation and --test", f"{shares[0]:g} and {shares[1]:g}", "shares >= 0 that leave some to train on"
        )
    if options.tokenizer and options.train_bpe is not None:
        bad_value("--train-bpe", f"{options.train_bpe} with --tokenizer", "one of them")
    if options.eot and not options.tokenizer:
        bad_value("--eot", f"{options.eot!r} without --tokenizer", "both or neither")
    tokenizer = Subwords.from_file(Path(options.tokenizer), options.eot or EOT) if options.tokenizer else Bytes()
    if options.name:
        source = sources.enwik8()
    elif options.text:
        source = sources.text_files([Path(p) for p in options.text], *shares)
    elif options.jsonl:
        source = sources.json_lines([Path(p) for p in options.jsonl], options.field, *shares)
    else:
        source = sources.hugging_face(
            options.hf, options.subset, options.split, options.field, options.streaming, *shares
        )
    if options.train_bpe is not None:
        tokenizer = Subwords.train((p.text for p in source() if p.split == "train"), options.train_bpe)
    index = prepare(out, source, tokenizer)
    for name, facts in index["splits"].items():
        print(f"{name}: {facts['tokens']:,} tokens, {facts['bytes']:,} bytes, {facts['documents']:,} documents")
    print(
        f"{out}: vocabulary of {index['vocab_size']:,}, {index['dtype']}. Train on it with: parashoot train CONFIG --data {out}"
    )
    return 0


def _train(options: argparse.Namespace) -> int:
    """Train a language model, on several processes under torchrun. Ctrl-C saves a checkpoint; --resume continues exactly."""
    from dataclasses import replace

    from .errors import bad_value
    from .lm.presets import find_training
    from .lm.processes import processes
    from .lm.report import introduce, report
    from .lm.train import holds_run, train

    name, config = find_training(options.name)
    changes = {k: getattr(options, k) for k in ("steps", "data") if getattr(options, k) is not None}
    flags = [
        v
        for k in ("steps", "data", "device")
        if getattr(options, k) is not None
        for v in (f"--{k}", str(getattr(options, k)))
    ]
    config = replace(config, **changes)
    directory = Path(options.resume or options.out or Path("runs") / name)
    again = shlex.join(["parashoot", "train", options.name, *flags, "--resume", str(directory)])
    if options.resume and (options.out or options.overwrite):
        bad_value("--resume", "it with --out or --overwrite", "it alone", "A resumed run stays where it is.")
    if holds_run(directory) and not (options.resume or options.overwrite):
        bad_value(
            "--out",
            f"'{directory}', which holds a run",
            "a new directory",
            f"Continue that run with --resume {shlex.quote(str(directory))}, or lose it with --overwrite.",
        )
    with processes(options.device) as group:

        def say(text: str) -> None:
            if group.rank == 0:
                print(text, flush=True)

        try:
            run = train(
                config, directory, group, resume=options.resume is not None, overwrite=options.overwrite,
                on_start=lambda run: say(introduce(run)),
            )  # fmt: skip
            if not run.interrupted:
                report(run, PROMPT)
                return 0
            say(f"\nStopped after step {run.step} of {config.steps}; nothing is lost. Continue with:\n  {again}")
        except KeyboardInterrupt:
            say(f"\nInterrupted. Continue from the last checkpoint with:\n  {again}")
    return 130


def _eval(options: argparse.Namespace) -> int:
    """Bits per byte and perplexity of a checkpoint over a split, every token scored once with the state carried along (Transformers: with --context)."""
    from .errors import bad_value
    from .lm import checkpoint
    from .lm.data import open_data
    from .lm.evaluate import evaluate, perplexity
    from .lm.export import check_tokenizer
    from .lm.processes import Processes, choose_device, precision
    from .lm.train_config import TrainConfig
    from .lm.update import uses_bf16

    for flag in ("streams", "window"):
        if getattr(options, flag) < 1:
            bad_value(f"--{flag}", str(getattr(options, flag)), "an integer >= 1")
    if options.lengths is not None and options.lengths < 0:
        bad_value("--lengths", str(options.lengths), "an integer >= 1")
    group, path, run = Processes(0, 1, choose_device(options.device)), Path(options.checkpoint), None
    if not (path / "config.json").is_file():
        path = checkpoint.find(path)
        run = TrainConfig.from_dict(checkpoint.facts(path)["config"])
    elif not options.data:
        bad_value(
            "--data", "none", "a directory that parashoot data wrote", f"'{path}' does not say what it trained on."
        )
    model = checkpoint.load_model(path, group.device)
    data = open_data(options.data or (run and run.data)).fitting(model.config.vocab_size)
    check_tokenizer(options.checkpoint, data.tokenizer)
    tokens = data.split(options.split)
    if len(tokens) < 2:
        bad_value("--split", f"{len(tokens)} tokens ({tokens.name})", "at least 2 to predict one")
    lower = precision(group, run is not None and uses_bf16(run, group))
    how = {"batch": options.streams, "window": options.window, "context": options.context, "lower": lower}
    found = evaluate(model, tokens, **how)
    print(f"{path}: {found.scored:,} tokens of {tokens.name}")
    print(
        f"bits per byte  {found.bits_per_byte:.4f}\nperplexity     {found.perplexity:.4f}\nloss           {found.loss:.4f}"
    )
    if options.lengths is not None:
        stream = options.lengths or 8 * (run.sequence_length if run else options.window)
        found = evaluate(model, tokens, stream=stream, **how)
        trained = f" (trained on {run.sequence_length:,})" if run else ""
        print(f"\nLoss by position in pieces of {stream:,} tokens{trained}:")
        print(f"{'position':>17} {'tokens':>12} {'loss':>8} {'perplexity':>11}")
        for first, last, count, nats in found.by_position:
            loss = nats / count
            print(f"{f'{first:,}-{last - 1:,}':>17} {count:12,} {loss:8.4f} {perplexity(loss):11.3f}")
    return 0


def _generate(options: argparse.Namespace) -> int:
    """Continue a prompt with a trained model, bytes printed as they are made."""
    import torch

    from .lm import checkpoint
    from .lm.export import tokenizer_file
    from .lm.generate import generate, generate_text
    from .lm.processes import choose_device
    from .lm.tokenizer import EOT, read_tokenizer

    model = checkpoint.load_model(options.checkpoint, choose_device(options.device))
    path = tokenizer_file(options.checkpoint)
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "seed": options.seed}
    if path is not None:
        tokenizer = read_tokenizer(path)
        prompt = options.prompt.encode("utf-8", "surrogateescape").decode(errors="replace")
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        if model.config.eos_token_id is None:
            model.config.eos_token_id = tokenizer.token_to_id(EOT)
        made = generate(model, torch.tensor(ids), options.tokens, **sampling)
        both = tokenizer.decode([*ids, *made])  # some decoders strip what they begin with
        print(prompt + both[len(tokenizer.decode(ids)) :])
    else:
        shown = [options.prompt]  # with the first piece, once all was found in order

        def show(piece: str) -> None:
            print("".join(shown) + piece, end="", flush=True)
            shown.clear()

        generate_text(model, options.prompt, options.tokens, on_text=show, **sampling)
        print("".join(shown))
    return 0


def _export(options: argparse.Namespace) -> int:
    """Write a checkpoint as a directory that transformers loads after `import parashoot.lm`: configuration, weights, tokenizer."""
    from .lm.export import export

    model = export(options.checkpoint, options.out, options.dtype)
    print(f"{options.out}: {model.num_parameters():,} parameters, {options.dtype}. After `import parashoot.lm`:")
    print(f'  AutoModelForCausalLM.from_pretrained("{options.out}"), AutoTokenizer.from_pretrained("{options.out}")')
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
        minutes=options.minutes, commit=options.commit, cases=options.cases,
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
