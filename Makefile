# What people and machines do with a checkout. `make` lists it.
# Every target that needs Python makes its own environment first, from the locks in requirements/.

SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
TESTS ?= tests
JOBS ?= 2
# the tests start hundreds of processes: what one of them has compiled, the next one need not
export PYTHONDONTWRITEBYTECODE :=
# arguments for quickstart, pytest and the benchmarks: make quickstart ARGS=--keep
ARGS ?=

.PHONY: help
help: ## list what there is
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# --- environments: a stamp says for which locks one was made, so a second call costs nothing ---

RUNTIME := $(VENV)/.tidemill-runtime
DEV := $(VENV)/.tidemill-dev

$(RUNTIME): requirements/runtime.txt requirements/venv.sh pyproject.toml
	@requirements/venv.sh $(VENV) runtime
	@touch $@

$(DEV): requirements/dev.txt requirements/venv.sh pyproject.toml
	@requirements/venv.sh $(VENV) dev
	@touch $@ $(RUNTIME)

# --- using it ---

.PHONY: quickstart
quickstart: $(RUNTIME) ## train, serve and ask a small model on this machine, and see what it cost
	@$(BIN)/tidemill quickstart $(ARGS)

# --- working on it ---

.PHONY: test
test: $(DEV) ## the tests
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadscope $(TESTS) $(ARGS)

.PHONY: test-long
test-long: $(DEV) ## the tests that take long, one after the other: links that are cut, heads that are killed
	@$(BIN)/python -m pytest -m long --hypothesis-profile=others $(TESTS) $(ARGS)

.PHONY: check
check: $(DEV) ## all that continuous integration checks: what reads the code side by side, then the tests
	@status=0; \
	$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync lint types layers docs-check || status=$$?; \
	$(MAKE) --no-print-directory test || status=$$?; \
	exit $$status

.PHONY: lint
lint: $(DEV) ## ruff: style and mistakes, and the format
	@$(BIN)/ruff check src tests benchmarks docs examples
	@$(BIN)/ruff format --check src tests benchmarks docs examples

.PHONY: format
format: $(DEV) ## let ruff mend what it can
	@$(BIN)/ruff check --fix src tests benchmarks docs examples
	@$(BIN)/ruff format src tests benchmarks docs examples

.PHONY: types
types: $(DEV) ## mypy --strict
	@$(BIN)/mypy

.PHONY: layers
layers: $(DEV) ## import-linter: imports go down the page
	@$(BIN)/lint-imports

.PHONY: docs
docs: $(DEV) ## write the generated pages of docs/reference
	@$(BIN)/python docs/generate.py

.PHONY: docs-check
docs-check: $(DEV) ## whether the generated pages are up to date
	@$(BIN)/python docs/generate.py --check

.PHONY: lock
lock: $(DEV) ## write requirements/*.txt anew (ARGS=--upgrade for the newest versions)
	@UV=$(BIN)/uv requirements/lock.sh $(ARGS)

# --- breaking it ---

.PHONY: faults
faults: $(DEV) ## kill, cut, fill and mistime a real cloud: every fault case on both databases (ARGS='--case 3,18')
	@$(BIN)/python -m tests.faults $(ARGS)

# --- measuring it ---

.PHONY: bench
bench: ## list the benchmarks
	@awk 'BEGIN {FS = ":.*## "} /^bench-[a-z]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: bench-latency
bench-latency: $(DEV) ## from submitting to the first line of output, beside Ray and a bare subprocess
	@$(BIN)/python benchmarks/latency.py $(ARGS)

.PHONY: bench-submit
bench-submit: $(DEV) ## durable submissions a second, on SQLite and on PostgreSQL
	@$(BIN)/python benchmarks/submit.py $(ARGS)

.PHONY: bench-packing
bench-packing: $(DEV) ## how full a GPU cluster gets, against FGD and best fit, by FGD's protocol
	@$(BIN)/python benchmarks/packing.py $(ARGS)

.PHONY: bench-speed
bench-speed: $(DEV) ## decisions a second: placements, turns, gangs, reclaim, from 100 to 100,000 nodes
	@$(BIN)/python benchmarks/speed.py $(ARGS)

.PHONY: bench-jct
bench-jct: $(DEV) ## job completion times on Muri's and Philly's traces, by order policy
	@$(BIN)/python benchmarks/jct.py $(ARGS)

.PHONY: bench-twin
bench-twin: $(DEV) ## a million jobs of a synthetic year on 1,000 nodes
	@$(BIN)/python benchmarks/twin.py $(ARGS)

.PHONY: bench-api
bench-api: $(DEV) ## jobs through REST to the last ledger line, on PostgreSQL
	@$(BIN)/python benchmarks/throughput.py $(ARGS)

.PHONY: bench-engine
bench-engine: $(DEV) ## short jobs a second on Ray and on Slurm, beside the engines' own ways; very many jobs at once
	@$(BIN)/python benchmarks/engine.py $(ARGS)

.PHONY: bench-restart
bench-restart: $(DEV) ## a control plane with 10,000 jobs: kill -9 to the next job placed; quote and why
	@$(BIN)/python benchmarks/restart.py $(ARGS)

.PHONY: bench-gateway
bench-gateway: $(DEV) ## the gateway's CPU and latency beside others', overload, metering, limits, open streams, cold start
	@$(BIN)/python benchmarks/gateway.py $(ARGS)

.PHONY: clean
clean: ## remove the environment, caches and what the benchmarks installed
	@rm -rf $(VENV) .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	@find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
