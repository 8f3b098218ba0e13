# `make help` lists the targets. Each does its own set-up: all it needs is Python, pip, make and git.
.DEFAULT_GOAL := help
.PHONY: help setup demo demo-vla test test-all test-vla bench docs lint format package

# The environment is .venv, whatever the caller's shell has activated.
unexport PYTHONPATH
unexport PYTHONHOME
unexport VIRTUAL_ENV

BIN := .venv/bin
READY := .venv/.ready
# MetaWorld needs another MuJoCo than OGBench has, so that it has an environment of its own.
VLA := .venv-metaworld

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make .venv, or bring it up to date (every target does this first)
	@:

$(READY): pyproject.toml .python-version .ci/setup.sh .ci/uv
	@.ci/setup.sh
	@touch $@

$(VLA)/.ready: pyproject.toml .python-version .ci/setup.sh .ci/uv
	@.ci/setup.sh $(VLA) --editable ".[lerobot,metaworld,plots,dev]" --editable ./adapters/lerobot_policy_qsteer
	@touch $@

demo: $(READY) ## run the demo; ARGS="..." goes to `qsteer demo`
	@$(BIN)/qsteer demo $(ARGS)

demo-vla: $(VLA)/.ready ## run the demo on lerobot's SmolVLA in MetaWorld, in an environment of its own
	@$(VLA)/bin/qsteer demo --host smolvla --out runs/demo-vla $(ARGS)

test: $(READY) ## run the tests; ARGS="..." goes to pytest
	@$(BIN)/python -m pytest $(ARGS)

test-all: $(READY) ## run the slow tests too
	@$(BIN)/python -m pytest -m "" $(ARGS)

test-vla: $(VLA)/.ready ## run the tests that need MetaWorld
	@$(VLA)/bin/python -m pytest -m "" tests/envs/test_metaworld.py tests/experiments/test_vla.py $(ARGS)

bench: $(READY) ## time rules, samplers and critics, without shape checks; ARGS="..." goes to pytest-benchmark
	@$(BIN)/python -m pytest tests/benchmarks -o addopts= --benchmark-columns=min,median,iqr,rounds $(ARGS)

docs: $(READY) ## build the documentation into build/docs, without a network; warnings are errors
	@$(BIN)/python -m sphinx -W --keep-going -n -q -d build/doctrees docs build/docs
	@echo "documentation: build/docs/index.html"

lint: $(READY) ## check style, format and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(READY) ## apply the style
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

package: $(READY) ## check what sdist and wheel would give a user
	@$(BIN)/python .ci/package.py
