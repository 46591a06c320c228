"""Every block of Python in the documentation runs, the blocks of a page one after another."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_on_language_models_runs():
    page = (DOCS / "language-models.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) > 5
    exec(compile("\n".join(blocks), "language-models.md", "exec"), {})
