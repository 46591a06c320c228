"""Time against the length or the width of the problem, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .rows import Row

AXES = {
    "time": ("steps T", lambda row: row["time"]),
    "width": ("sequences x channels", lambda row: row["batch"] * row["channels"]),
}


def plot(rows: Sequence[Row], axis: str, path: Path) -> bool:
    """Draw forward and backward times, log-log, one line a contestant, from rows that agree with the loop; False without matplotlib.

    The dashed line is the floor: bytes that must move once over the copy bandwidth.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    name, at = AXES[axis]
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    for axes, pass_, index in zip(panels, ("forward", "backward"), (0, 1), strict=True):
        drawn = sorted((r for r in rows if f"{pass_}_us" in r and r["status"] == "ok"), key=at)
        for k, contestant in enumerate(contestants):
            line = [r for r in drawn if r["contestant"] == contestant]
            if line:
                low, middle, high = zip(*(r[f"{pass_}_us"] for r in line), strict=True)
                x, color = [at(r) for r in line], f"C{k}"
                axes.plot(x, [v * 1e-3 for v in middle], "o-", markersize=3, color=color, label=contestant)
                axes.fill_between(x, [v * 1e-3 for v in low], [v * 1e-3 for v in high], color=color, alpha=0.2)
        ours = [r for r in drawn if r["contestant"].startswith("scan")]
        floor = sorted({(at(r), r["floor_us"][index] * 1e-3) for r in ours})
        axes.plot([x for x, _ in floor], [y for _, y in floor], "--", color="black", linewidth=0.8, label="floor")
        axes.set(xscale="log", yscale="log", xlabel=name, title=pass_)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return True
