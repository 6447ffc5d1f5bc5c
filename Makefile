# Environments and checks: `make demo` shows it work, `make test` runs every check, on a fresh clone and nothing else.
# PYTHON=python3.12 chooses an interpreter, TORCH='torch==2.13.0+cpu --index-url ...' a build of PyTorch.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP = -m pip --disable-pip-version-check --quiet

.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   train a small Llama on this machine's CPU, from raw text to a Hugging Face checkpoint"
	@echo "make test   lint, types and all tests; installs Slurm where it may (root on Debian)"
	@echo "make lint   lint and types alone"
	@echo "make clean  remove environments and caches; runs/, data/ and your recipes stay"

# PyTorch comes first and by itself, so that the build chosen above is the one that the rest is installed beside.
.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) install '$(firstword $(TORCH))' $(wordlist 2,9,$(TORCH))
	.venv/bin/python $(PIP) install -e '.[dev]'
# The reference for token files and their order; its own dependencies are not needed for that.
	.venv/bin/python $(PIP) install --no-deps megatron-core==0.16.1
	touch $@

.venv-demo/installed: setup.py
	$(PYTHON) -m venv .venv-demo
	.venv-demo/bin/python $(PIP) install '$(firstword $(TORCH))' $(wordlist 2,9,$(TORCH))
	.venv-demo/bin/python $(PIP) install -e .
	touch $@

demo: .venv-demo/installed
	.venv-demo/bin/python -m launch.demo

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Tests of one process share the cores; those of several processes, and of Slurm's clocks, have them to themselves.
test: lint
	.venv/bin/pytest --numprocesses 2 --dist loadfile tests/unit
	.venv/bin/pytest --ignore tests/unit

clean:
	rm -rf .venv .venv-demo *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
