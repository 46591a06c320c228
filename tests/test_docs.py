"""Every block of the documentation runs, the blocks of a page one after another, and prints what the page says it prints."""

import contextlib
import io
import math
import re
import shlex
import sys
from pathlib import Path

import pytest

from parashoot.cli import main

pytest.importorskip("transformers")
DOCS = Path(__file__).parents[1] / "docs"
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?"


@pytest.mark.parametrize(("name", "least"), [("language-models.md", 6), ("parallelize.md", 4), ("iterations.md", 1)])
def test_a_page_runs(name, least):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= least
    exec(compile("\n".join(blocks), name, "exec"), {})


def test_the_tutorial_runs(tmp_path, monkeypatch):
    """Python runs and sh is given to the command line, in one directory; a block that a line `name`: announces becomes that file."""
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    page, names, printed, checked = (DOCS / "tutorial.md").read_text(), {}, "", 0
    for before, kind, block in re.findall(r"([^\n]*)\n\n```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        file = re.search(r"`([\w.]+)`:$", before)
        if file:
            Path(file[1]).write_text(block)
        elif kind == "text":
            assert agrees(block, printed), f"{block}\nis not what came:\n{printed}"
            checked += 1
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                if kind == "python":
                    exec(compile(block, "tutorial.md", "exec"), names)
                for line in block.splitlines() if kind == "sh" else []:
                    assert main(shlex.split(line)[1:]) == 0, line
            printed = out.getvalue()
    assert checked > 5
    sys.modules.pop("surprise", None)


def agrees(shown: str, printed: str) -> bool:
    """Whether the texts are the same: `...` stands for anything, numbers may differ by a third or 1, small ones by a factor of 10."""
    parts = [re.escape(part).replace(r"\.\.\.", ".*?") for part in re.split(NUMBER, shown)]
    found = re.fullmatch(f"({NUMBER})".join(parts), printed, re.DOTALL)
    numbers = [float(n.replace(",", "")) for n in re.findall(NUMBER, shown)]
    came = [float(n.replace(",", "")) for n in found.groups()] if found else []
    return found is not None and all(
        0.1 < a / b < 10 if "e" in f"{a:g}" else math.isclose(a, b, rel_tol=1 / 3, abs_tol=1)
        for a, b in zip(numbers, came, strict=True)
    )
