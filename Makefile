# make demo | test | check | bench | docs | fuzz | soak | soak-cluster | dist | clean. Needs Python 3.11 or newer, nothing else: everything goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without compiling what most runs never import, an installation takes half the time.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test check bench docs fuzz soak soak-cluster dist clean

demo: $(VENV)/.demo
	$(BIN)/aionpredis demo

test: $(VENV)/.develop
	$(BIN)/python -m pytest -n 3  # tests wait more than they compute

check: $(VENV)/.develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python -m bench

# The site, in build/site: every page anew, a warning is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fresh-env --fail-on-warning --keep-going docs build/site
	@echo build/site/index.html

# Each target of tests/fuzz in turn. Not part of make test: atheris is not made for every platform.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.fuzz
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

# SOAK_SECONDS=600 by default
soak: $(VENV)/.develop
	$(BIN)/python -m tests.soak

# SOAK_FAULTS=20 failovers and as many migrations by default
soak-cluster: $(VENV)/.develop
	$(BIN)/python -m tests.soak --cluster

# The sdist, and the wheel that is made of it. tests/test_dist.py says what is in them.
dist: $(VENV)/.dist
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .fuzz
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.develop: $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[test,demo]'
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[bench]'
	@touch $@

$(VENV)/.dist: $(VENV)/.made pyproject.toml
	$(INSTALL) 'build>=1.2' 'twine>=6.1'
	@touch $@

$(VENV)/.docs: $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/.fuzz: $(VENV)/.made pyproject.toml
	$(INSTALL) --editable '.[test,fuzz]'
	@touch $@
