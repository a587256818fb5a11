# make demo   three workers, a sealed model, one answer
# make test   what CI runs
# make check  style, types and rings alone
# make interop  js-libp2p as a foreign client; needs node and npm
# make fuzz   all parsers of untrusted bytes, FUZZ_SECONDS in all (600)
# Each makes .venv first; afterwards .venv/bin/sotto is there.
PYTHON ?= python3
FUZZ_SECONDS ?= 600
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
.PHONY: demo test check fuzz interop wheel clean prerequisites

demo: .venv/runs
	$(BIN)/sotto demo

test: .venv/tests check
	$(BIN)/pytest -n 2 --dist loadfile

check: .venv/tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Guided by coverage where atheris is installed: .venv/bin/pip install -e '.[fuzz]'
fuzz: .venv/tests
	$(BIN)/python -m tests.fuzz $(FUZZ_SECONDS)

# Beside the tests, not below them: what npm installs is nobody's to lint.
interop: .venv/tests
	@command -v node >/dev/null && command -v npm >/dev/null || { echo "skipped: node and npm are not here"; exit 0; }; \
	  mkdir -p .venv/interop && cp tests/interop/*.json tests/interop/*.mjs .venv/interop/ && \
	  (cd .venv/interop && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error) && \
	  $(BIN)/pytest -n 0 -m interop tests/interop

wheel: .venv/tests
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv build dist *.egg-info

.venv/runs: pyproject.toml constraints.txt $(wildcard models/csrc/*) | prerequisites
	@echo "installing sotto into .venv (a few minutes the first time)"
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	@touch $@

.venv/tests: .venv/runs
	$(PIP) -e '.[dev]'
	@touch $@

# fastecdsa, which libp2p needs, comes as source: a C compiler, Python's headers and GMP's headers must be there.
prerequisites:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "sotto needs Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "Python's venv module is missing: sudo apt install python3-venv"; exit 1; }
	@command -v gcc >/dev/null || { echo "a C compiler is missing: sudo apt install gcc"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "Python's headers are missing: sudo apt install python3-dev"; exit 1; }
	@echo '#include <gmp.h>' | gcc -E -x c - >/dev/null 2>&1 || \
	  { echo "GMP's headers are missing: sudo apt install libgmp-dev"; exit 1; }
