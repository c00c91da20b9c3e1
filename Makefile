# SPDX-License-Identifier: Apache-2.0
# Everything runs from a fresh clone: a target installs what it needs and is missing.

PYTHON ?= python3
# Tests wait for a third of their time: three workers keep two processors busy.
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
LOCK_VENV := build/lock
# From wheels only: no code of a package runs while it is installed.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all:
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo check test matrix audit docs bench soak fuzz mutants lock clean system-demo system-test system-matrix

help:
	@echo 'make demo   a key in SoftHSM, a signature, a D1 access token from the sandbox'
	@echo 'make test   everything: make check, then all tests'
	@echo 'make matrix a chosen part of the tests on every Python that is found, as another user, and'
	@echo '            with the lowest releases that are admitted'
	@echo 'make audit  known advisories about the locked releases (ADVISORIES=FOLDER: asks nobody)'
	@echo 'make check  ruff, mypy --strict, the import contracts'
	@echo 'make docs   the site: pages, API reference and search, in build/site, to be read without a server'
	@echo 'make bench  the measured figures, beside those of the peers'
	@echo 'make soak   the long stress runs'
	@echo 'make fuzz   changed bytes for every decoder, until it is stopped'
	@echo 'make mutants  do the tests notice a change: 300 of them, by a seed (SEED=N, COUNT=N, ONLY=MODULE)'
	@echo 'make lock   write requirements/ anew (UPGRADE=1: with the newest releases)'
	@echo 'make clean  remove what the other targets made'
	@echo 'PYTHON=python3.12 chooses the interpreter; it must be 3.11 or newer.'

demo: $(VENV)/.demo system-demo
	$(BIN)/d1-signer demo

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Stress tests have deadlines that pass, and wait for most of their time: they run after the others;
# those that measure tenths of a second have the machine to themselves.
test: check system-test
	$(PYTEST) -p no:benchmark -n $(JOBS) --dist worksteal -m 'not stress and not soak'
	$(PYTEST) -p no:benchmark -n $(JOBS) --dist worksteal -m 'stress and not alone and not soak' || test $$? -eq 5
	$(PYTEST) -p no:benchmark -m 'alone and not soak' || test $$? -eq 5

matrix: system-test system-matrix
	PYTHON=$(PYTHON) JOBS=$(JOBS) scripts/matrix

audit: $(VENV)/.dev
	$(BIN)/python scripts/audit $(if $(ADVISORIES),--advisories $(ADVISORIES)) requirements/dev.txt requirements/lowest.txt

# A warning is an error: a dead link, a page in no group, a docstring that cannot be read.
docs: $(VENV)/.docs
	rm -rf build/site build/site-cache
	$(BIN)/python -m sphinx -W --keep-going -q -j $(JOBS) -c docs/site -d build/site-cache . build/site
	@echo 'Open build/site/index.html'

bench: $(VENV)/.bench system-test
	$(BIN)/python -m tests.bench

# The seed of each round is told, so that a failure can be had again.
fuzz: $(VENV)/.dev
	while true; do \
	    D1_SIGNER_FUZZ_CASES=20000 $(PYTEST) -p no:benchmark -p no:cacheprovider -q tests/fuzz \
	        --hypothesis-seed=$$(date +%s) || exit 1; \
	done

# Each change is made in a copy; tests/project/mutants.toml explains what may survive.
mutants: $(VENV)/.dev system-test
	nice $(BIN)/python scripts/mutants --jobs $(JOBS) --seed $(or $(SEED),1) --count $(or $(COUNT),300) \
	    $(addprefix --only ,$(ONLY))

soak: $(VENV)/.dev system-test
	$(PYTEST) -p no:benchmark -m soak

system-demo:
	@scripts/system-packages demo

system-test:
	@scripts/system-packages test

system-matrix:
	@scripts/system-packages matrix

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'Python 3.11 or newer is needed. Name one: make PYTHON=python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Each of these holds the one before; all come from locks with hashes.
$(VENV)/.demo: $(VENV)/bin/python requirements/demo.txt pyproject.toml
	$(PIP_INSTALL) --require-hashes -r requirements/demo.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.demo requirements/dev.txt
	$(PIP_INSTALL) --require-hashes -r requirements/dev.txt
	@touch $@

$(VENV)/.docs: $(VENV)/.demo requirements/docs.txt
	$(PIP_INSTALL) --require-hashes -r requirements/docs.txt
	@touch $@

$(VENV)/.bench: $(VENV)/.dev requirements/bench.txt requirements/bench-no-deps.txt
	$(PIP_INSTALL) --require-hashes -r requirements/bench.txt
	$(PIP_INSTALL) --no-deps --ignore-requires-python --require-hashes -r requirements/bench-no-deps.txt
	@touch $@

lock: $(VENV)/bin/python requirements/lock.txt
	$(VENV)/bin/python -m venv $(LOCK_VENV)
	$(LOCK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: \
	    --require-hashes -r requirements/lock.txt
	UV=$(LOCK_VENV)/bin/uv scripts/lock $(if $(UPGRADE),--upgrade)

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
