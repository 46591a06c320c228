"""The architecture as a test: who may import whom, where Triton may be imported, and how long a file may be."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "parashoot"
SHORT = {SRC / name for name in ("scan.py", "plan.py", "op.py", "trace.py")} | set(SRC.glob("solve/*.py"))

# Groups of modules, foundations first: each may import itself and the rows before its own. "parashoot" is the package, whose
# __init__.py re-exports everything up to the layers. Concrete cells stand apart: few may name them, and they know only `cell`.
ROWS = "errors garbage lock | cell | graph rules | heads | trace | tiling | plan | parallel_plan | solve triton | op | scan | diagnostics tune | layers parallelize | parashoot | lm bench | tasks | cli | __main__"
RANK = {group: rank for rank, row in enumerate(ROWS.split("|")) for group in row.split()}
NAME_CELLS = {"cells", "layers", "lm", "tasks", "bench", "cli"}


def imports(node: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[int, str, bool]]:
    """Line and full name of each import under `node`, and whether it waits for a call."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((child.lineno, alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = importlib.util.resolve_name("." * child.level + (child.module or ""), package)
            yield from ((child.lineno, f"{base}.{alias.name}", lazy) for alias in child.names)
        yield from imports(child, package, lazy or isinstance(child, ast.FunctionDef | ast.Lambda))


def ours() -> Iterator[tuple[str, str, str, bool]]:
    """For each import of the package: where it stands, the group it stands in, the name, and whether it waits for a call."""
    for path in sorted(SRC.rglob("*.py")):
        place, package = path.relative_to(SRC), ".".join(path.relative_to(SRC.parent).parent.parts)
        for line, name, lazy in imports(ast.parse(path.read_text()), package):
            yield f"{place}:{line} imports {name}", place.parts[0].removesuffix(".py"), name, lazy


def allowed(group: str, name: str) -> bool:
    parts = name.split(".")
    if parts[0] != "parashoot" or group == "__init__":
        return True
    target = parts[1] if len(parts) > 1 and parts[1] in {*RANK, "cells"} else "parashoot"
    if "cells" in (group, target):
        return group in NAME_CELLS if target == "cells" else target in ("cell", "errors")
    return target == group or RANK[target] < RANK[group]


def test_every_module_has_its_place() -> None:
    groups = {path.stem for path in SRC.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert groups - {*RANK, "cells", "__init__"} == set()


def test_imports_point_one_way() -> None:
    assert [where for where, group, name, _ in ours() if not allowed(group, name)] == []


def test_triton_is_imported_where_it_is_used() -> None:
    eager = [(where, group) for where, group, name, lazy in ours() if name.split(".")[0] == "triton" and not lazy]
    assert [where for where, group in eager if group != "triton"] == []


def test_the_package_imports_without_triton() -> None:
    modules = [name for name in ("parashoot", "parashoot.cli") if importlib.util.find_spec(name)]
    code = f"import sys; sys.modules['triton'] = None; import {', '.join(modules)}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SRC.parent)


def test_files_stay_short() -> None:
    paths = [path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in paths}
    assert {path: n for path, n in lengths.items() if n > (400 if path in SHORT else 600)} == {}
