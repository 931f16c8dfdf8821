# Two commands are enough on a machine with Python 3.11 or later, pip and make:  make demo  and  make test.
# Another interpreter:  make setup PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The stamp is written last and its name holds everything the set-up depends on, so a set-up that was cut short, a changed
# requirement or a moved folder is put right by the next call, and nothing runs when all is well.
KEY := $(shell { cat pyproject.toml constraints.txt tools/setup.sh; pwd; } | cksum | cut -d ' ' -f 1)
READY := $(VENV)/ready-$(KEY)
BROKEN := $(shell [ -x $(BIN)/python ] || echo broken)
# Once the packages are in, the demo and the tests need no network and must not try.
demo test bench: export HF_HUB_OFFLINE := 1
test chaos: export OMP_NUM_THREADS := 1

.DEFAULT_GOAL := help
broken:
.PHONY: broken help setup demo test chaos check format docs bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

$(READY): $(BROKEN)
	@PYTHON="$(PYTHON)" VENV="$(VENV)" READY="$(READY)" sh tools/setup.sh

setup: $(READY) ## make .venv with everything the demo and the tests need (done by the other targets too)

demo: $(READY) ## train the embedded model over a few simulated clients and write a report
	@$(BIN)/splitft demo

test: $(READY) ## run the tests, three processes of one thread each: some wait for a network
	$(BIN)/python -m pytest -n 3 -q $(ARGS)

chaos: $(READY) ## kill, cut and pause federations of real processes for a quarter of an hour (ARGS="--chaos-seed 7")
	$(BIN)/python -m pytest -q -m chaos tests/chaos tests/deploy $(ARGS)

check: $(READY) ## style, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_layers.py tests/test_banned.py

format: $(READY) ## rewrite the source in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## write the generated pages of docs/
	$(BIN)/python tools/docs.py

bench: $(READY) ## measure everything of docs/benchmarks.md: about 25 minutes (Flower too: ARGS="--flower-python PATH")
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
	find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
