# `make demo` and `make test` do all their own set-up in .venv; they need Python 3.11 and pip.

SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := build/demo

# One thread per process: ranks share the cores, and sums keep one order.
export OMP_NUM_THREADS := 1

.PHONY: test lint demo clean
.DELETE_ON_ERROR:

test: lint
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

demo: $(STAMP)
	@mkdir -p $(DEMO)
	@echo "== A plan of examples/gpt.py for 8 GPUs of the default cluster"
	$(BIN)/lga-plan examples/gpt.py --gpus 8 --batch-size 32 --output $(DEMO)/gpt-8.plan.yaml
	@echo "== A plan for a pipeline of 4 processes on this machine"
	$(BIN)/lga-plan examples/gpt.py --gpus 4 --cluster cpu --pipeline-ranks 4 --batch-size 32 --schedule layered \
	  --output $(DEMO)/gpt-cpu.plan.yaml
	@echo "== Its proof, and its timeline"
	$(BIN)/lga-check $(DEMO)/gpt-cpu.plan.yaml
	$(BIN)/lga-show $(DEMO)/gpt-cpu.plan.yaml
	@echo "== Thirty training steps under it"
	$(BIN)/lga-run $(DEMO)/gpt-cpu.plan.yaml examples/gpt.py --steps 30 \
	  --timeline $(DEMO)/measured.json
	@echo "== The last step against the prediction, and both in one trace for ui.perfetto.dev"
	$(BIN)/lga-show $(DEMO)/gpt-cpu.plan.yaml --measured $(DEMO)/measured.json \
	  --trace $(DEMO)/trace.json
	@echo "== The plan that was run: $(DEMO)/gpt-cpu.plan.yaml"

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find planner runtime profiles examples tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@echo "== Setting up .venv (minutes, the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,hf]'
	@touch $@
