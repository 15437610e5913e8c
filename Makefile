# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv with the pinned versions first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
OLDEST := .venv-oldest

.PHONY: demo check test test-oldest lint bench clean

demo: $(STAMP)
	$(BIN)/d2o demo

# Lint and the fast tests: under 90 seconds on two cores.
check: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

test: lint
	$(BIN)/python -m pytest -n 2

# With the oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# With the peers that install here; those that do not are named as missing.
bench: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[test,bench]'
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(OLDEST) runs

# torch first and alone: its exact pin takes the CPU build where there is one; an open range would fetch CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install -q -c constraints-oldest.txt torch
	$(OLDEST)/bin/pip install -q -c constraints-oldest.txt -e '.[test]'
	touch $@
