"""Language models on enwik8: the recipes' learning rates found on the validation split, then their results on the test split.

    python benchmarks/enwik8.py sweep [--steps 600] [--jobs 4]     # every model at its three rates, and the GRU's variants
    python benchmarks/enwik8.py final [--steps 5000] [--jobs 1]    # each model at its best rate of the sweep, then `parashoot eval`
    python benchmarks/enwik8.py time [--steps 5000] [--jobs 1]     # the same, for as long as ParaGRU takes for its steps
    python benchmarks/enwik8.py table                              # prints the results as Markdown

Needs data/enwik8 (`parashoot data data/enwik8 enwik8`). Runs lie in runs/enwik8; rows go to --out, and what has one there is not run
again. `--jobs` runs share a GPU, so their own times say little. Speeds come from a GPU to itself, rows of

    python benchmarks/lm_step.py --models recipes/enwik8-*.json --shapes 32x2048 --compile --out benchmarks/results/lm-step.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Lock
from typing import Any

import torch

from parashoot.bench.results import facts, markdown

HERE = Path(__file__).parent
RUNS = Path("runs/enwik8")
RATES = {
    "gated-delta": (1e-3, 2e-3, 4e-3), "transformer": (5e-4, 1e-3, 2e-3), "paragru": (2e-3, 4e-3, 8e-3), "paralstm": (2e-3, 4e-3, 8e-3),
}  # fmt: skip
VARIANTS = {
    "heads 1": {"num_heads": 1}, "heads 8": {"num_heads": 8}, "state x2": {"state_expansion": 2},
    "state x4 for MLP": {"state_expansion": 4, "num_heads": 16, "num_hidden_layers": 6, "intermediate_size": 384},
}  # fmt: skip
"""Changes to the GRU, run at its middle rate; the last one has as many parameters as without."""
NAMES = ("kind", "model", "variant", "learning_rate", "steps")


@dataclass
class Job:
    """One run: a recipe, what is changed of it, and what its row says beside the result."""

    recipe: str
    steps: int
    rate: float
    kind: str
    variant: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        return RUNS / f"{self.kind}-{self.recipe}-{self.variant.replace(' ', '-')}-{self.rate:g}-{self.steps}"

    @property
    def config(self) -> Path:
        """The file of its configuration, of which no two runs may share one."""
        return self.directory.with_name(f"{self.directory.name}.json")

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "model": self.recipe, "variant": self.variant, "learning_rate": self.rate, "steps": self.steps
        }  # fmt: skip

    def run(self, gpu: str) -> dict[str, Any]:
        """Train, evaluate a final run, and return the row."""
        config = json.loads((HERE.parent / f"recipes/enwik8-{self.recipe}.json").read_text())
        config |= {"steps": self.steps, "learning_rate": self.rate, "checkpoint_every": 1000}
        config["model"] |= self.changes
        path, text, report = self.config, json.dumps(config, indent=2), self.directory / "report.json"
        same = path.is_file() and path.read_text() == text
        path.write_text(text)
        row = self.facts | {"tokens": self.steps * config["batch_size"] * config["sequence_length"]}
        if not (same and report.is_file()):
            begun = same and (self.directory / "latest").exists()
            where = ["--resume", str(self.directory)] if begun else ["--out", str(self.directory), "--overwrite"]
            _parashoot(gpu, path, "train", str(path), *where)
        found = json.loads(report.read_text())
        row |= {k: found[k] for k in ("validation_bits_per_byte", "minutes", "tokens_per_s")}
        if self.kind != "sweep":
            said = _parashoot(gpu, path, "eval", str(self.directory), "--split", "test", "--streams", "32")
            row["test_bits_per_byte"] = float(re.findall(r"bits per byte\s+([\d.]+)", said)[0])
        return row


def _parashoot(gpu: str, log: Path, *arguments: str) -> str:
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    command = [sys.executable, "-m", "parashoot", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    log.with_name(f"{log.stem}.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def sweep(steps: int) -> list[Job]:
    jobs = [Job(model, steps, rate, "sweep") for model, rates in RATES.items() for rate in rates]
    middle = RATES["paragru"][1]
    jobs += [Job("paragru", steps, middle, "sweep", name, changes) for name, changes in VARIANTS.items()]
    # Its kernels tune themselves for minutes, once: later runs find the result on the disk.
    return sorted(jobs, key=lambda job: job.recipe == "gated-delta" and job.rate != RATES[job.recipe][0])


def speeds(path: Path) -> dict[str, dict[str, Any]]:
    """The newest row of each recipe in the results of lm_step.py as --help says, at the recipe's shape and on one GPU."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    named = {f"enwik8-{model}": model for model in RATES}
    wanted = {"batch": 32, "length": 2048, "micro_batch": 32, "processes": 1, "compile": True, "precision": "bf16"}
    rows = [r for r in rows if Path(r["model"]).stem in named and "ms" in r and wanted.items() <= r.items()]
    return {named[Path(r["model"]).stem]: r for r in rows}


def equal_time(steps: int, rows: list[dict[str, Any]], speed: dict[str, dict[str, Any]]) -> list[Job]:
    """The models of `final` but ParaGRU, each with as many steps as it makes while that one makes `steps`."""
    if speed.keys() < RATES.keys():
        raise SystemExit(
            f"no speed of {sorted(RATES.keys() - speed.keys())}: measure it with lm_step.py, as --help says"
        )
    jobs = [job for job in final(steps, rows) if job.recipe != "paragru"]
    return [
        Job(job.recipe, round(steps * speed["paragru"]["ms"] / speed[job.recipe]["ms"]), job.rate, "time")
        for job in jobs
    ]


def final(steps: int, rows: list[dict[str, Any]]) -> list[Job]:
    """Each model at the best rate of the longest sweep. Exits where that is not complete: no model has more tries than another."""
    found = [r for r in rows if r["kind"] == "sweep" and not r["variant"]]
    longest = max((r["steps"] for r in found), default=0)
    found = [r for r in found if r["steps"] == longest]
    missing = {(m, rate) for m, rates in RATES.items() for rate in rates} - {
        (r["model"], r["learning_rate"]) for r in found
    }
    if missing:
        raise SystemExit(
            f"the sweep of {longest} steps lacks {sorted(missing)}: run it to the end with --steps {longest}"
        )
    best = {r["model"]: r for r in sorted(found, key=lambda r: -r["validation_bits_per_byte"])}  # the last one stays
    return [Job(model, steps, row["learning_rate"], "final") for model, row in best.items()]


def run(jobs: list[Job], lanes: int, out: Path, where: dict[str, Any]) -> None:
    """All jobs, `lanes` at a time on each GPU; rows are written as they come."""
    RUNS.mkdir(parents=True, exist_ok=True)
    places, lock = Queue[str](), Lock()
    for _ in range(lanes):
        for gpu in range(max(1, torch.cuda.device_count())):
            places.put(str(gpu) if torch.cuda.is_available() else "")

    def one(job: Job) -> None:
        gpu = places.get()
        try:
            row = job.run(gpu)
        finally:
            places.put(gpu)
        with lock, out.open("a") as file:
            file.write(json.dumps({**row, "jobs_a_gpu": lanes, **where}) + "\n")
            print(f"{row['model']:12} {row['variant']:9} {row['learning_rate']:g}: "
                  f"{row['validation_bits_per_byte']:.4f} {row.get('test_bits_per_byte', '')}", flush=True)  # fmt: skip

    with ThreadPoolExecutor(places.qsize()) as pool:
        list(pool.map(one, jobs))


def table(rows: list[dict[str, Any]], speed: dict[str, dict[str, Any]]) -> str:
    """Markdown of the results on the test split, with the speed of a GPU to itself, and of the sweep."""
    ran = [["model", "rate", "steps", "parameters", "tokens", "tokens/s", "minutes", "validation", "test"]]
    swept = [["model", "rate", "steps", "validation"]]
    for r in sorted(rows, key=lambda r: (r["kind"], r["steps"], r["model"], r["variant"], r["learning_rate"])):
        name = f"{r['model']}, {r['variant']}" if r["variant"] else r["model"]
        head, score = [name, f"{r['learning_rate']:g}", f"{r['steps']:,}"], f"{r['validation_bits_per_byte']:.4f}"
        if r["kind"] == "sweep":
            swept.append([*head, score])
            continue
        size = pace = minutes = "not measured"
        if alone := speed.get(r["model"]):
            size, pace = f"{alone['parameters'] / 1e6:.1f}M", f"{alone['tokens_per_s']:,.0f}"
            minutes = f"{r['tokens'] / alone['tokens_per_s'] / 60:.1f}"
        ran.append([*head, size, f"{r['tokens'] / 1e6:.0f}M", pace, minutes, score, f"{r['test_bits_per_byte']:.4f}"])
    return "\n\n".join(markdown(lines) for lines in (ran, swept) if len(lines) > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sweeps and results on enwik8.")
    parser.add_argument("what", choices=("sweep", "final", "time", "table"))
    parser.add_argument(
        "--steps", type=int, help="of each run, or of ParaGRU's (default: 600 for the sweep, 5000 for the results)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs that share a GPU (default: 1)")
    parser.add_argument("--models", nargs="+", choices=tuple(RATES), default=tuple(RATES))
    parser.add_argument("--commit", metavar="HASH", help="what the rows call this version (default: git's)")
    parser.add_argument("--out", type=Path, default=HERE / "results/enwik8.jsonl", help="rows are added here")
    parser.add_argument("--speeds", type=Path, default=HERE / "results/lm-step.jsonl", help="results of lm_step.py")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if options.what == "table":
        print(table(rows, speeds(options.speeds)))
        return
    if options.what == "sweep":
        jobs = sweep(options.steps or 600)
    elif options.what == "final":
        jobs = final(options.steps or 5000, rows)
    else:
        jobs = equal_time(options.steps or 5000, rows, speeds(options.speeds))
    where = facts(torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.commit)
    known = [tuple(row[name] for name in NAMES) for row in rows]
    jobs = [
        job for job in jobs if job.recipe in options.models and tuple(job.facts[name] for name in NAMES) not in known
    ]
    run(jobs, options.jobs, options.out, where)


if __name__ == "__main__":
    main()
