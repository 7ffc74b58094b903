# make demo    train on five novels, write, and go on from a saved state        make test    what CI runs
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

# PyTorch and Numba have a pool of threads each: idle ones must sleep, or they take the cores from the others
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test lint docs bench clean

demo: .venv/installed
	$(BIN)/python examples/demo.py

# one thread a worker: two workers share two cores
test: .venv/developed lint
	$(BIN)/mypy
	NUMBA_NUM_THREADS=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/developed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/documented
	$(BIN)/mkdocs build --strict

bench: .venv/installed
	$(BIN)/riverrun bench

.venv/torch: constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "riverrun needs Python 3.11 or later: make PYTHON=python3.12 ..."; exit 1; }
	@echo "creating .venv and installing PyTorch, the large part (minutes on a slow line)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) torch
	@touch $@

.venv/installed: .venv/torch pyproject.toml
	@echo "installing riverrun and what else it stands on"
	@$(PIP) -e .
	@touch $@

.venv/developed: .venv/torch pyproject.toml
	@echo "installing riverrun with what its tests need"
	@$(PIP) -e ".[dev]"
	@touch $@ .venv/installed

.venv/documented: .venv/torch pyproject.toml
	@echo "installing riverrun with what its documentation needs"
	@$(PIP) -e ".[docs]"
	@touch $@

clean:
	rm -rf .venv runs site
