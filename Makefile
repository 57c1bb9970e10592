# Everything that one does with this checkout, and nothing is written outside of it. `make` lists it.
# The virtual environment is .venv; stamp files in it remember what was installed, so that a second
# `make run` starts at once. Tools are run as modules, so that a copied checkout works as well.

SHELL := /bin/sh
VENV := .venv
PY := $(VENV)/bin/python
# More workers than cores: most tests wait, for a child process or a clock. Full sizes need the cores.
PYTEST := $(PY) -m pytest -q --dist loadfile
FOREIGN := tests/browser tests/interop # they drive other programs, and take minutes
PIP := $(PY) -m pip install --quiet --no-cache-dir
PYTHONS := $(PYTHON) python3.13 python3.12 python3.11 python3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-dev run test test-full lint types check bench docs images clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## install what the service needs, into .venv

setup-dev: $(VENV)/.installed-dev ## also install what tests and checks need

run: setup ## start the service; options: make run ARGS="--port 9000"
	@exec $(PY) server.py $(ARGS)

test: setup-dev ## run the tests with small sizes; a part of them: make test ARGS="-k config"
	@mkdir -p test-output
	SCALE=small PYTEST_DEBUG_TEMPROOT=test-output $(PYTEST) -n 4 $(FOREIGN:%=--ignore=%) $(ARGS)

test-full: setup-dev ## run the tests with full sizes, and with browsers and foreign clients
	@mkdir -p test-output
	SCALE=full PYTEST_DEBUG_TEMPROOT=test-output $(PYTEST) -n 2 $(ARGS)

lint: setup-dev ## check style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup-dev ## check types
	$(PY) -m mypy

check: lint types ## lint and types

bench: setup-dev ## measure
	$(PY) benchmarks/run.py $(ARGS)

docs: setup ## write the generated pages of docs/
	$(PY) config.py > docs/.new && mv docs/.new docs/configuration.md
	$(PY) -m jobs.states > docs/.new && mv docs/.new docs/states.md
	$(PY) errors.py > docs/.new && mv docs/.new docs/errors.md

images: setup-dev ## take the pictures of docs/images anew, with the system's Chromium
	$(PY) tests/browser/screenshots.py

clean: ## remove .venv, caches and the output of tests; never data/
	rm -rf $(VENV) test-output .pytest_cache .mypy_cache .ruff_cache .hypothesis docs/.new
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: requirements.txt $(VENV)/.made
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(PIP) -r requirements-dev.txt
	@touch $@

# A working environment is kept, whoever made it; half of one is replaced. Each Python is tried by
# running it: a version manager puts names on the PATH that only print an error.
$(VENV)/.made:
	@if $(PY) -m pip --version >/dev/null 2>&1; then touch $@; exit 0; fi; \
	rm -rf $(VENV); newest=; \
	for python in $(PYTHONS); do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  newest=$${newest:-$$python}; \
	  $$python -c 'import ensurepip, venv' 2>/dev/null || continue; \
	  echo "$$python -m venv $(VENV)"; \
	  $$python -m venv $(VENV) && touch $@; exit; \
	done; \
	if [ -z "$$newest" ]; then \
	  echo "Sluice needs Python 3.11 or newer; name one: make setup PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	if command -v virtualenv >/dev/null; then \
	  echo "virtualenv $(VENV)"; virtualenv --quiet --python "$$newest" $(VENV) && touch $@; exit; \
	fi; \
	echo "$$newest cannot make a virtual environment; install it: apt-get install python3-venv" >&2; exit 1
