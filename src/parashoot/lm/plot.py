"""The loss curve of a run as a PNG."""

from __future__ import annotations

from pathlib import Path


def loss_curve(bits: list[float], validation: float | None, path: Path) -> bool:
    """Draw the bits per byte of each training step, and the final `validation` value; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    smooth, mean = [], bits[0]
    for v in bits:
        mean += (v - mean) * 0.05
        smooth.append(mean)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    steps = range(1, len(bits) + 1)
    axes.plot(steps, bits, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
    axes.plot(steps, smooth, color="tab:blue", label="training, smoothed")
    if validation is not None:
        axes.plot([len(bits)], [validation], "o", color="tab:red", label=f"validation {validation:.3f}")
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True
