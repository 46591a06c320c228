"""Every exception this library raises, and the wording of its messages.

A message names the argument, what came, what was expected and what to do. `ArgumentError` and `ArgumentTypeError` are
`ValueError` and `TypeError`, so callers may catch either; a cell that cannot be parallelized raises `CellError` (a
`TypeError`) or `StructureError` (a `ValueError`).
"""

from __future__ import annotations

import importlib
from typing import Any, NoReturn


class ArgumentError(ValueError):
    """An argument has the right type and a wrong value: a shape, a size, a dtype, a device, an option."""


class ArgumentTypeError(TypeError):
    """An argument has the wrong type."""


class CellError(TypeError):
    """A step breaks the rules of a cell: its signature, its outputs, randomness, in-place writes, Python branches."""


class StructureError(ValueError):
    """A step mixes channels, heads or sequences that its declared structure keeps apart."""


class BackendError(ValueError):
    """A backend was asked for by name and cannot run this cell here."""


class GradientError(RuntimeError):
    """A derivative was asked for that the library does not provide."""


class DivergedError(RuntimeError):
    """A training's loss or its gradient became infinite or NaN; the last checkpoint is from before that."""


class MissingPackageError(ImportError):
    """A part of the library needs packages that are not installed."""


class ConvergenceError(RuntimeError):
    """A set `max_iters` was reached before the tolerance.

    Attributes: `iterations` (int), `defect` (float), `tolerance` (float).
    """

    def __init__(self, iterations: int, defect: float, tolerance: float, chunks: int):
        self.iterations, self.defect, self.tolerance = iterations, defect, tolerance
        super().__init__(
            f"MultipleShooting stopped at max_iters={iterations} with defect {defect:.3g} above tol={tolerance:.3g}. "
            f"With {chunks} chunks the loop's answer is reached after at most {chunks} iterations: leave max_iters=None "
            f"to run until converged, choose a longer chunk_length, or use ps.Sequential()."
        )


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before it is untouched."""


def describe(value: Any) -> str:
    """What came, in a few words: shape, dtype and device of a tensor, otherwise type and value."""
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        return f"a tensor of shape {tuple(shape)}, {value.dtype}, on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def bad_value(argument: str, came: Any, expected: str, remedy: str = "") -> NoReturn:
    """Raise `ArgumentError`: `argument` was `came`, `expected` was wanted, do `remedy`."""
    came = came if isinstance(came, str) else describe(came)
    raise ArgumentError(f"{argument}: got {came}; expected {expected}." + (f" {remedy}" if remedy else ""))


def bad_type(argument: str, came: Any, expected: str, remedy: str = "") -> NoReturn:
    """Raise `ArgumentTypeError`: `argument` was `came`, `expected` was wanted, do `remedy`."""
    raise ArgumentTypeError(
        f"{argument}: got {describe(came)}; expected {expected}." + (f" {remedy}" if remedy else "")
    )


def needs(part: str, extra: str, package: str) -> Any:
    """The optional `package` that `part` needs, imported. Raises `MissingPackageError` naming the `extra` that brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise MissingPackageError(f"{part} needs {package}: pip install 'parashoot[{extra}]'.") from e


def bad_cell(cell: str, problem: str, remedy: str, line: str = "") -> NoReturn:
    """Raise `CellError` about the step of `cell`, pointing at the user's `line` where it is known."""
    raise CellError(f"cell '{cell}': {problem}{f' ({line})' if line else ''}. {remedy}")
