"""What is made of a results file: tables of accuracy and cost, and plots of accuracy against length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from ..bench.results import Row, groups, markdown
from .suite import VARIED

DYNAMICS = {"iterations": "sweeps", "lyapunov": "largest Lyapunov exponent", "speedup": "times faster than the loop"}
LEGEND = (
    "Accuracy in percent, of tokens, of last tokens or of whole sequences as the title says: the best of the seeds (their mean), each at the learning rate with its best "
    "validation score. sweeps, Lyapunov: of the recurrent layer at the end of training, the largest of the seeds. cut off: "
    "trainings that ended in time or diverged, and were tested as they were."
)


def picked(rows: Sequence[Row]) -> list[Row]:
    """For each experiment, model and seed the row of the learning rate with the best validation score.

    Rows get the keys "experiment" (all of a trial but what varies inside it), "title" (different ones differ), "model" and "seed".
    """
    labelled = []
    for row in rows:
        trial = row["trial"]
        loop = ", loop" if trial["solver"] == "sequential" else ""
        shared = json.dumps({k: v for k, v in trial.items() if k not in (*VARIED, "solver")}, sort_keys=True)
        name = f"{trial['model'].replace(':', ' ', 1)}{loop}"
        labelled.append({**row, "experiment": shared, "model": name, "seed": trial["seed"]})
    best = groups(labelled, "experiment", "model", "seed").values()
    rows = [max(of_seed, key=lambda row: row["validation"]) for of_seed in best]
    for row in rows:
        row["title"] = title(row)
    for alike in groups(rows, "title").values():
        trials = {row["experiment"]: json.loads(row["experiment"]) for row in alike}
        names = dict.fromkeys(name for trial in trials.values() for name in trial)
        apart = [name for name in names if len({json.dumps(trial.get(name)) for trial in trials.values()}) > 1]
        apart = [name for name in apart if name != "validate_every"] or apart
        for row in alike:
            row["title"] += "".join(f", {name} {json.dumps(trials[row['experiment']].get(name))}" for name in apart)
    return rows


def title(row: Row) -> str:
    """The task, its options, the training length and what is counted."""
    trial = row["trial"]
    options = "".join(f" {k}={v}" for k, v in trial["options"].items())
    shortest = f"{trial['shortest']}-" if trial["shortest"] else ""
    return f"{trial['task']}{options}, {shortest}{trial['length']}, by {row['metric']}"


def accuracies(rows: Sequence[Row], length: str) -> list[float]:
    """In percent, at a test length, of each seed that was tested there."""
    return [100 * row["test"][length][row["metric"]] for row in rows if length in row["test"]]


def tables(rows: Sequence[Row]) -> str:
    """Accuracy by task, test length and model; then, for each task and model, what training took."""
    best = picked(rows)
    models = list(groups(best, "model"))
    scores, costs = [["task, trained at", "tested at", *(name for (name,) in models)]], [
        ["task, trained at", "model", "parameters", "rates", "steps", "seconds", "device", "sweeps", "Lyapunov"]
    ]  # fmt: skip
    for of_task in groups(best, "experiment").values():
        by_model = groups(of_task, "model")
        for length in of_task[0]["test"]:
            found = [accuracies(by_model.get(model, []), length) for model in models]
            scores.append([of_task[0]["title"], length, *map(_figure, found)])
        for (name, device), seeds in groups(of_task, "model", "device").items():
            rates = sorted({row["trial"]["learning_rate"] for row in seeds})
            solved = [row["curve"][-1]["solver"] for row in seeds if row["curve"] and row["curve"][-1]["solver"]]
            costs.append([
                seeds[0]["title"], name, f"{seeds[0]['parameters']:,}", " ".join(f"{rate:g}" for rate in rates),
                f"{mean(row['steps'] for row in seeds):,.0f}{_cut(seeds)}", f"{mean(row['seconds'] for row in seeds):.1f}", device,
                f"{max(s['iterations'] for s in solved):.0f}" if solved else "",
                f"{max(s['lyapunov'] for s in solved):.3f}" if solved else "",
            ])  # fmt: skip
    return f"{markdown(scores)}\n\n{markdown(costs)}\n\n{LEGEND}"


def _cut(seeds: Sequence[Row]) -> str:
    """How many were not trained to their end."""
    cut = sum(row["stopped"] in ("time", "diverged") for row in seeds)
    return f" ({cut} cut off)" if cut else ""


def _figure(values: list[float]) -> str:
    if not values:
        return ""
    return f"{max(values):.1f}" + (f" ({mean(values):.1f})" if len(values) > 1 else "")


def plot(rows: Sequence[Row], path: Path) -> bool:
    """Accuracy against test length: a panel for each experiment, a line for each model (the best seed; shaded: all seeds), dashed the
    training length. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    panels = list(groups(picked(rows), "experiment").values())
    columns = min(3, len(panels))
    figure = Figure(figsize=(4.6 * columns, 3.6 * -(-len(panels) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for axes, of_task in zip(grid, panels, strict=False):
        for (name,), seeds in groups(of_task, "model").items():
            found = {int(n): accuracies(seeds, n) for n in sorted(seeds[0]["test"], key=int)}
            axes.plot(list(found), [max(v) for v in found.values()], "o-", markersize=3, label=name)
            axes.fill_between(list(found), *([f(v) for v in found.values()] for f in (min, max)), alpha=0.15)
        axes.axvline(of_task[0]["trial"]["length"], linestyle="--", color="gray", linewidth=0.8)
        axes.set(
            title=of_task[0]["title"],
            xlabel="test length",
            ylabel=f"{of_task[0]['metric']} accuracy, %",
            ylim=(-3, 103),
        )
        axes.legend(fontsize=7)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
    return True


def plot_training(rows: Sequence[Row], path: Path) -> bool:
    """Sweeps of the solver, largest Lyapunov exponent and, where it was measured, speed-up over the loop against the training step: a row of
    panels for each experiment, a line for each model and seed. False without matplotlib or recurrent layers."""
    solved = [row for row in picked(rows) if row["curve"] and row["curve"][0]["solver"]]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not solved:
        return False
    experiments = groups(solved, "experiment").values()
    shown = [name for name in DYNAMICS if all(name in row["curve"][0]["solver"] for row in solved)]
    figure = Figure(figsize=(4.6 * len(shown), 3.2 * len(experiments)), layout="constrained")
    grid = figure.subplots(len(experiments), len(shown), squeeze=False)
    for panels, of_task in zip(grid, experiments, strict=True):
        for axes, figure_name in zip(panels, shown, strict=True):
            for number, ((name,), seeds) in enumerate(groups(of_task, "model").items()):
                for k, row in enumerate(seeds):
                    at = (
                        [point["step"] for point in row["curve"]],
                        [point["solver"][figure_name] for point in row["curve"]],
                    )
                    axes.plot(*at, ".-", color=f"C{number % 10}", linewidth=0.9, label=None if k else name)
            scale = "linear" if figure_name == "lyapunov" else "log"
            axes.set(title=of_task[0]["title"], xlabel="training step", ylabel=DYNAMICS[figure_name], yscale=scale)
        panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return True


def render(rows: Sequence[Row], out: Path) -> None:
    """Print the tables of `rows`, and plot them beside the results file `out`."""
    image, training = out.with_suffix(".png"), out.with_name(f"{out.stem}-training.png")
    if rows:
        print(f"\n{tables(rows)}\n")
        print(f"Plot: {image}" if plot(rows, image) else "Plot: not drawn, matplotlib is not installed.")
        if plot_training(rows, training):
            print(f"Plot: {training}, sweeps and Lyapunov exponents while training")
    print(f"Results: {out}, {len(rows)} rows")
