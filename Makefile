# Every target builds .venv from nothing where it is missing. PYTHON must be 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
# One pin for all installs: a dependency must not pull another torch (and gigabytes of CUDA packages) behind our back.
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart test check trials peers benchmarks clean

quickstart: .venv/.run
	$(BIN)/potstill quickstart $(ARGS)

test: .venv/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -q $(ARGS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(MAKE) test

# Minutes each: the full quickstart with its scrambled twin, launches of several processes, long kill loops.
trials: .venv/.test
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# TRL, Liger and torchtune live in an environment of their own: they are compared with, never depended on.
peers: .venv-peers/.done
	.venv-peers/bin/python -m pytest -q -m peers $(ARGS)

benchmarks: .venv-peers/.done
	.venv-peers/bin/python benchmarks/fused_loss.py
	.venv-peers/bin/python benchmarks/sparse_loss.py
	.venv-peers/bin/python benchmarks/training_step.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.torch: .venv/bin/python constraints.txt
	$(PIP) torch
	touch $@

.venv/.run: .venv/.torch pyproject.toml
	$(PIP) -e ".[report,tensorboard]"
	touch $@

.venv/.test: .venv/.torch pyproject.toml
	$(PIP) -e ".[report,tensorboard,test]"
	touch $@

.venv/.dev: .venv/.test
	$(PIP) -e ".[dev]"
	touch $@

.venv-peers/.done: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-peers
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-peers/bin/python -m pip install --quiet torch
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-peers/bin/python -m pip install --quiet -e ".[test]" trl liger-kernel torchtune torchao
	touch $@

clean:
	rm -rf .venv .venv-peers runs
