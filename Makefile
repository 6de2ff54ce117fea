# Commands for development. They run in one environment, $(VENV), created on first use and again when
# pyproject.toml or constraints.txt changes.
#
#   make demo                    the whole pipeline, small, on this machine (ARGS="--out DIR")
#   make test                    the tests, two files at a time             (ARGS="-k shards")
#   make check                   formatting, lint, types, dependency direction, spelling
#   make soak                    the tests that take many minutes
#   make docs                    the documentation site, in build/site
#   make package                 sdist and wheel, in dist; the wheel is installed alone and tried
#   make setup                   the environment alone
#   make clean                   remove the environment and every cache
#
# PYTHON=python3.12 picks the interpreter, VENV=DIR another environment.

VENV   ?= .venv
PYTHON ?=
ARGS   ?=

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UNDER_WAY := $(VENV).installing
SHELL     := /bin/sh

# Arguments that succeed if d2i runs on this interpreter.
SUITS := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'

# DeepSpeed looks for `ninja`, and Ray's workers for `d2i`, on PATH.
export PATH := $(abspath $(BIN)):$(PATH)

.NOTPARALLEL:
.PHONY: help demo test check docs package soak setup interpreter clean

help:
	@sed -n '/^#  /s/^# *//p' Makefile

demo: setup
	@echo "make demo: running d2i demo $(ARGS)"
	@$(BIN)/d2i demo $(ARGS)

# Files are handed out in the order of collection: those of tests/unit, which take seconds, come last
# and keep both processes busy to the end. xdist's own order puts the files with few tests last, and
# some of these run for minutes.
test: setup
	@echo "make test: running the tests"
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

soak: setup
	@echo "make soak: running the tests that take many minutes"
	@$(BIN)/python -m pytest -m soak --timeout 3600 $(ARGS) || { \
	  status=$$?; [ $$status -eq 5 ] || exit $$status; echo "make soak: no soak test matched"; }

check: setup
	@echo "make check: formatting (ruff format)"
	@$(BIN)/python -m ruff format --check
	@echo "make check: lint (ruff)"
	@$(BIN)/python -m ruff check
	@echo "make check: spelling (codespell)"
	@$(BIN)/codespell
	@echo "make check: dependency direction (import-linter)"
	@$(BIN)/lint-imports
	@echo "make check: types (mypy --strict)"
	@$(BIN)/python -m mypy

docs: setup
	@echo "make docs: building the site in build/site"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# The wheel is built from the sdist, and run where nothing of the checkout is.
package: setup
	@echo "make package: building the sdist and the wheel in dist"
	@rm -rf dist build/package
	@mkdir -p build
	@$(BIN)/python -m build --outdir dist > build/package.log 2>&1 || \
	  { cat build/package.log >&2; exit 1; }
	@echo "make package: installing the wheel alone, and verifying data with it"
	@$(BIN)/python -m venv build/package
	@build/package/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt dist/d2i-*.whl
	@cd build/package && bin/d2i --version && bin/d2i verify $(CURDIR)/tests/made_before/data

setup: interpreter $(INSTALLED)

# If PYTHON names an interpreter, it must be the one of the environment.
interpreter:
	@[ -z "$(PYTHON)" ] || "$(PYTHON)" $(SUITS) 2>/dev/null || { \
	  echo "make: PYTHON=$(PYTHON) is not Python 3.11 or 3.12; give the path of one" >&2; exit 2; }
	@[ -z "$(PYTHON)" ] || [ ! -x $(BIN)/python ] || \
	  [ "$$("$(PYTHON)" -c 'import sys; print(sys.version_info[:2])')" = \
	    "$$($(BIN)/python -c 'import sys; print(sys.version_info[:2])')" ] || { \
	  echo "make: $(VENV) was created with another Python than PYTHON=$(PYTHON);" \
	    "run 'make clean' first, or give another VENV=DIR" >&2; exit 2; }

# $(UNDER_WAY) remains if an installation is interrupted: pip may take a half-copied package for a
# complete one, so the environment is then created again.
$(INSTALLED): pyproject.toml constraints.txt
	@if [ -e $(UNDER_WAY) ]; then \
	  echo "make setup: the last installation was interrupted; starting over"; \
	  rm -rf $(VENV); \
	fi
	@touch $(UNDER_WAY)
	@{ $(BIN)/python $(SUITS) && $(BIN)/python -m pip --version; } >/dev/null 2>&1 || { \
	  python=; \
	  for candidate in $(PYTHON) python3 python3.12 python3.11 python; do \
	    if "$$candidate" $(SUITS) 2>/dev/null; then python=$$candidate; break; fi; \
	  done; \
	  [ -n "$$python" ] || { \
	    echo "make setup: no Python 3.11 or 3.12 on PATH; install one, or run" \
	      "'make PYTHON=/path/to/python3.12 ...'" >&2; exit 2; }; \
	  echo "make setup: creating $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV) || { rm -rf $(VENV); \
	    echo "make setup: '$$python -m venv' failed; on Debian and Ubuntu, install python3-venv" >&2; \
	    exit 2; }; \
	}
	@echo "make setup: installing d2i and the exact versions of constraints.txt" \
	  "(the first time: minutes, about 7 GB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[all,dev]' || { \
	  echo "make setup: the installation failed (see above); run the same command again" >&2; exit 1; }
	@rm -f $(UNDER_WAY)
	@touch $(INSTALLED)
	@echo "make setup: done"

clean:
	@echo "make clean: removing $(VENV), caches and build directories"
	@rm -rf $(VENV) $(UNDER_WAY) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
	  .import_linter_cache .hypothesis
	@find . -path ./.git -prune -o -name __pycache__ -type d -exec rm -rf {} +
