# One environment, .venv, serves every target. It is made again when pyproject.toml or constraints.txt change.
#   make PYTHON=python3.12 demo      another interpreter
#   make PIP_FLAGS="..." demo        further options of pip install, such as an index with a CPU build of torch

PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

# Nothing may ask a hub for a file.
export HF_HUB_OFFLINE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make .venv

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[test,lint]'
	@touch $@

demo: $(INSTALLED) ## fine-tune a 4-bit model with LoRA next to its unoptimized twin
	$(BIN)/python examples/demo.py

test: $(INSTALLED) ## every test that needs no GPU, kernels in Triton's interpreter
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n 2

test-gpu: $(INSTALLED) ## every test, kernels compiled, on the first GPU
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"'
	$(BIN)/pytest

lint: $(INSTALLED) ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and every cache
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
