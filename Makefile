# Every target makes the virtual environment when it is missing. `make demo` and `make test` are all a fresh clone needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
READERS := tests/readers/node_modules/.package-lock.json
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt

.PHONY: demo test check slow bench wheel clean

demo: $(READY)
	$(BIN)/kvpipe demo

test: $(READY) $(READERS)
	$(BIN)/python -m pytest -n 3 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 5400 -s

bench: $(READY)
	$(BIN)/python -m pytest -o addopts=--import-mode=importlib tests/benchmarks --benchmark-only --benchmark-disable-gc -m "not gpu" -s

wheel: $(READY)
	$(BIN)/python -m build --wheel

# torch comes first, by its pin: resolved later, pip could fetch a build with gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvpipe needs Python 3.11 or newer; set PYTHON=/path/to/it" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $(READY)

# node and npm come from a wheel; they serve one test, that zarrita reads a store.
$(READERS): tests/readers/package-lock.json | $(READY)
	$(BIN)/npm ci --prefix tests/readers --loglevel error --no-audit --no-fund
	touch $(READERS)

clean:
	rm -rf $(VENV) tests/readers/node_modules dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis kvpipe-demo
