# Each target sets itself up in .venv. PYTHON names the interpreter to start from (3.10 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip's CPU build of torch is enough here; override to install from elsewhere, e.g. PIP_ARGS="--index-url ..."
PIP_ARGS ?=

PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=5
# What CI takes of the long tests: another tenth for each commit.
COMMIT = $(shell git rev-parse HEAD 2>/dev/null || echo none)

.PHONY: install demo test test-lowest test-long ci-slice lint smoke soak clean

install: $(VENV)/.installed
demo: $(VENV)/.installed
	$(BIN)/eva-mim pipeline configs/pipelines/demo.yaml --out runs/demo

test: $(VENV)/.installed-test
	$(PYTEST) -m "not long"

# The fast tests with the oldest versions, in an environment of its own (torch is a download of 3 GB): by hand, not in CI.
test-lowest: .venv-lowest/.installed
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 --dist loadfile

.venv-lowest/.installed: tests/lowest.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q $(PIP_ARGS) -c tests/lowest.txt -e ".[test]"
	@touch $@

# Everything that is exhaustive for its own sake, property tests with 1,000 examples, and 40 kills: within an hour.
test-long: $(VENV)/.installed-test
	$(PYTEST) -m long
	$(PYTEST) --dist load -m "not long" --hypothesis-profile=long tests/test_fuzz.py
	$(BIN)/python -m tools.soak $(SOAK)

ci-slice: $(VENV)/.installed-test
	@echo "of the long tests, those of $(COMMIT):"
	@$(BIN)/python -m pytest -m long --long-slice=$(COMMIT) --collect-only || test $$? -eq 5
	$(PYTEST) -m long --long-slice=$(COMMIT) || test $$? -eq 5

smoke: $(VENV)/.installed-test
	$(BIN)/python -m tools.cifar10_smoke

# Kills a run 40 times. SOAK="--kills 8 --minutes 10 run.epochs=4" is the short form that CI calls.
SOAK ?=
soak: $(VENV)/.installed-test
	$(BIN)/python -m tools.soak $(SOAK)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	$(BIN)/python -m pip install -q $(PIP_ARGS) -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .venv-lowest runs build dist *.egg-info
