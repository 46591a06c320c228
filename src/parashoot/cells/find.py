"""Cells by name: a shipped one ("gru"), or the import path of one of yours ("package.module:attribute")."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .. import cells
from ..cell import Cell
from ..errors import bad_type, bad_value


def find_cell(name: str, *, argument: str = "cell", files: bool = False) -> Cell:
    """The cell called `name` in `parashoot.cells`, or `module:attribute`; with `files` also `path/to/file.py:attribute`.

    Raises `ArgumentError` naming `argument` and the shipped cells, `ArgumentTypeError` if the attribute is not a cell.
    """
    if not isinstance(name, str):
        bad_type(argument, name, "the name of a cell", f"Shipped: {shipped()}.")
    if ":" not in name:
        if name not in cells.__all__:
            forms = "'module:attribute'" + (" or 'path/to/file.py:attribute'" if files else "")
            bad_value(argument, repr(name), f"one of {shipped()}, or {forms}")
        return getattr(cells, name)
    where, _, attribute = name.rpartition(":")
    module = _load_file(where, argument) if files and where.endswith(".py") else _import(where, argument)
    found = getattr(module, attribute, None)
    if found is None:
        names = [k for k, v in vars(module).items() if isinstance(v, Cell)]
        bad_value(argument, repr(name), f"an attribute of {where}", f"Its cells: {', '.join(names) or 'none'}.")
    if not isinstance(found, Cell):
        bad_type(f"{argument} '{name}'", found, "a cell", "Decorate the step with @ps.cell.")
    return found


def shipped() -> str:
    """The names of the shipped cells, for a message."""
    return ", ".join(cells.__all__)


def _import(where: str, argument: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except (ModuleNotFoundError, ValueError, TypeError) as e:  # no name, or a relative one
        bad_value(argument, repr(where), "an importable module", f"{e}; run from its directory or install it.")


def _load_file(where: str, argument: str) -> ModuleType:
    path = Path(where)
    if not path.is_file():
        bad_value(argument, repr(where), "an existing Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as e:
        bad_value(argument, f"'{where}', line {e.lineno}: {e.msg}", "a Python file")
    return module
