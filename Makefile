# Everything is self-sufficient on a fresh clone with Python 3.11+ and make.
PYTHON ?= python3
PLATFORM ?= adworld
# As they were typed: make leaves their dollar signs alone.
override export Q := $(value Q)
override export DATA := $(value DATA)
override export TRY := $(value TRY)
BIN := .venv/bin
DATA_FLAG := $(if $(DATA),--data "$$DATA")

.PHONY: help demo test lint ui sql scoreboard results tune bench clean
.DEFAULT_GOAL := help

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-12s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/ready ## Run the whole pipeline: PLATFORM=adworld (default) or PLATFORM=kuairand DATA=folder
	@$(BIN)/mtmd demo --platform $(PLATFORM) $(DATA_FLAG)

test: .venv/ready ## All tests, in two processes
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/ready ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

ui: .venv/ready ## The Dagster UI on http://localhost:3000, or another PORT
	@$(BIN)/mtmd ui $(if $(PORT),--port "$(PORT)")

sql: .venv/ready ## A DuckDB prompt on the tables, or one query: make sql Q="FROM slice_metrics"
	@$(BIN)/mtmd sql --platform $(PLATFORM) $(if $(Q),"$$Q")

scoreboard: .venv/ready ## LogMAE by slice and task, of every evaluated day
	@$(BIN)/mtmd scoreboard --platform $(PLATFORM)

results: .venv/ready ## MTMD against its contenders and ablations, into docs/results.md: MODELS=contenders for these alone, SEEDS=2
	@$(BIN)/mtmd results --platform $(PLATFORM) $(DATA_FLAG) $(if $(MODELS),--models "$(MODELS)") $(if $(SEEDS),--seeds "$(SEEDS)")

tune: .venv/ready ## The search behind the settings of MTMD and its contenders; one change alone, on every tuning day with two seeds: TRY="max_epochs=45" MODELS=mtmd
	@$(BIN)/mtmd tune --platform $(PLATFORM) $(DATA_FLAG) $(if $(MODELS),--models "$(MODELS)") $(if $(TRY),--try "$$TRY")

bench: .venv/ready ## Speed and memory beside limits and peers: ONLY=feed,step for some, LARGE=1 for the goals' own sizes
	@$(BIN)/python -m benchmarks.bench $(if $(ONLY),--only "$(ONLY)") $(if $(LARGE),--large)

clean: ## Remove the environment; the home (.mtmd) stays
	rm -rf .venv

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
