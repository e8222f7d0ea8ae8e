# Each target is complete in itself: the environment is made from the lock if it is not there.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
DEMO := outputs/demo
SIZES ?= none,n2,n4,n6
SEEDS ?= 0,1,2,3,4
EVALUATE := $(BIN)/python evaluate.py -m experiment=demo
WORKERS ?= 2

.PHONY: env demo test lint clean

env: .venv/.made

.venv/.made: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@touch $@

# The whole story on the embedded model: the unpruned model, the cut at several sizes, then every way of fine-tuning at
# its tuned learning rate over five seeds. The picks are one and the same rate, so this is also the comparison at a fixed
# rate. Everything is cached in artifacts/.
demo: env
	rm -rf $(DEMO)/jobs
	$(EVALUATE) pruning=$(SIZES) finetune=none seed=0 hydra.sweep.dir=$(DEMO)/jobs/sizes $(ARGS)
	$(EVALUATE) seed=$(SEEDS) hydra.sweep.dir=$(DEMO)/jobs/arms $(ARGS)
	$(BIN)/python -m sdd.report $(DEMO)/jobs --out $(DEMO)

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q $(ARGS)

clean:
	rm -rf artifacts outputs
