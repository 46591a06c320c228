"""What every test runs under: the helpers importable, one thread for each worker, the same numbers each time.

Without a GPU, kernels run in Triton's interpreter, which has to be asked for before Triton is imported.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
slow_is_fine = [HealthCheck.too_slow]  # the first example also traces the cell
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=15, suppress_health_check=slow_is_fine)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiling(monkeypatch):
    """A function that makes every plan with kernels use one tiling."""
    from parashoot import plan

    def use(chosen):
        for choice in ("choose", "choose_heads"):
            monkeypatch.setattr(plan, choice, lambda *_: (chosen, ("chosen by a test",)))
        plan.make_plan.cache_clear()

    yield use
    monkeypatch.undo()
    plan.make_plan.cache_clear()
