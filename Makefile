# Every target works from a fresh clone: the first one makes a virtual environment in $(VENV).
#
#   make test                     lint, then the tests that need neither a GPU nor patience
#   make test MARKS=slow          other tests, by pytest marker expression
#   make test ARGS="-k gru -x"    more arguments for pytest
#   make test PYTHON=python3.12   another interpreter to make the environment with
#   make test PY=python3          no environment: this interpreter as it is, which has at least torch and pytest
#
# On a machine without an NVIDIA GPU, plain PyPI gives Linux a CUDA build of PyTorch: it works, but is large. For the CPU build:
#
#   make TORCH_FLAGS="--index-url https://download.pytorch.org/whl/cpu"
#   make TORCH="torch==2.12.0"    another version; TORCH_FLAGS are further arguments for that pip install

PYTHON ?= python3
VENV ?= .venv
MARKS ?= not gpu and not slow
ARGS ?=

HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ifeq ($(filter-out 0,$(HAS_GPU)),)
# Triton's interpreter runs the kernels on a CPU; that of Triton 3.6 fails from NumPy 2.4 on.
TORCH ?= torch==2.13.0
NUMPY := numpy<2.4
else
TORCH ?= torch>=2.11
NUMPY := numpy
endif
TORCH_FLAGS ?=

READY := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
WORKERS := -n auto --maxprocesses=4 --dist worksteal
ifeq ($(origin PY),command line)
NEEDS :=
export PYTHONPATH := src
# An environment of the user's own may lack the linters and xdist: they are left out there, and only there.
WORKERS := $(if $(shell $(PY) -c 'import xdist' 2>/dev/null && echo yes),$(WORKERS))
LINTERS := $(shell $(PY) -c 'import ruff, pyright' 2>/dev/null && echo yes)
else
NEEDS := $(READY)
PY := $(VENV)/bin/python
LINTERS := yes
endif

.PHONY: venv test test-gpu demo lint bench-cpu iteration-table verify clean
.DELETE_ON_ERROR:

venv: $(NEEDS)

$(READY): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "No $(PYTHON) here. Install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "parashoot needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make environments: apt-get install python3-venv" >&2; exit 1; }
	@echo "making $(VENV) with $(TORCH); the downloads take a while"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" $(TORCH_FLAGS)
# A CUDA build of PyTorch brings the Triton it was made for; a CPU build brings none.
	$(VENV)/bin/python -c 'import triton' 2>/dev/null || $(PIP) install "triton==3.6.0; platform_system == 'Linux'"
	$(PIP) install "$(NUMPY)"
# Nothing below may replace what was chosen above.
	$(PIP) freeze | grep -iE '^(torch|triton|numpy)==' > $(VENV)/constraints.txt
	$(PIP) install --constraint $(VENV)/constraints.txt --editable ".[dev]"
	@touch $@

ifeq ($(LINTERS),yes)
lint: $(NEEDS)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath "$$(command -v $(PY))"
else
lint:
	@echo "not linted: $(PY) has no ruff and pyright" >&2
endif

# One thread a worker: more of them only wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest $(WORKERS) -m "$(MARKS)" $(ARGS)

test-gpu: $(NEEDS)
	$(PY) -m pytest -m gpu $(ARGS)

# Stops where an earlier run lies: make demo ARGS=--overwrite, or ARGS="--resume runs/demo"
demo: $(NEEDS)
	$(PY) -m parashoot train demo $(ARGS)

bench-cpu: $(NEEDS)
	$(PY) benchmarks/cpu.py $(ARGS)

iteration-table: $(NEEDS)
	$(PY) benchmarks/iterations.py $(ARGS)

verify: $(NEEDS)
	$(PY) -m parashoot verify $(ARGS)

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
