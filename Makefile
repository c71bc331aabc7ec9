# Everything a newcomer needs: `make run` and `make test`, as root or not, with nothing installed beforehand but Python.
#
#   make run     a pod of real programs comes up, is seen working, and ends
#   make test    all tests that this machine can run, the slow ones beside each other (the guest's fetch a kernel of 41 MB once);
#                with ARGS one pytest with these arguments
#   make lint    ruff, mypy and the arrows between packages
#   make bench   launches, measured against a C floor and the other runtimes here
#   make soak    random operations, from a seed, for SOAK seconds (600): launches, nests, kills, agents that die; tests/soak/soak.py says
#                what is looked at. ARGS is for it: --seed N does again what failed
#   make long    the long versions of the tests that launch containers, a thousand times where `make test` does it a dozen times,
#                again and again for SOAK seconds, up to the first failure; ARGS is for pytest
#
# PYTHON chooses the interpreter (≥ 3.11), VENV where the environment goes. ARGS is handed on.
#
# Unless it is named: the system's own if it will do, else the one on PATH. Distributions optimise theirs by profile and let everybody
# run it; those of version managers are often slower by a fifth and lie in one user's home.

CANDIDATES = /usr/bin/python3 python3 python3.13 python3.12 python3.11
SUITABLE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(shell for each in $(CANDIDATES); do $$each -c '$(SUITABLE)' 2>/dev/null && echo $$each; done) python3)
VENV ?= .venv
SOAK ?= 600
ARGS ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help run test lint bench soak long clean

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile

# Anew when what is to be installed has changed. A venv without pip (no ensurepip on the system) is no use, so it goes again.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mesocosm needs Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "is the package python3-venv installed?" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

run: $(STAMP)
	@$(BIN)/meso run contrib/examples/hello/pod.toml $(ARGS)

test: $(STAMP)
	@$(if $(ARGS),$(BIN)/python -m pytest -q $(ARGS),tests/rings $(BIN)/python)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@arrows=$$($(BIN)/lint-imports --no-cache 2>&1) && echo "$$arrows" | tail -n 1 || { echo "$$arrows"; exit 1; }

bench: $(STAMP)
	@$(BIN)/python contrib/bench/launch.py $(ARGS)

soak: $(STAMP)
	@$(if $(filter 0,$(shell id -u)),$$(tests/apart probe true 2>/dev/null && echo tests/apart soak)) \
	    $(BIN)/python -B tests/soak/soak.py --seconds $(SOAK) $(ARGS)

long: export MESOCOSM_SOAK = 1
long: $(STAMP)
	@end=$$(($$(date +%s) + $(SOAK))); round=0; while [ $$(date +%s) -lt $$end ]; do round=$$((round + 1)); \
	    echo "long: round $$round, $$((end - $$(date +%s))) s left"; $(BIN)/python -m pytest -q -x -m "soak or system or guest" $(ARGS) || exit 1; done

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
