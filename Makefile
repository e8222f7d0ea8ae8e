# Each target is complete in itself: the environment is made from the lock if it is not there.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
DEMO := outputs/demo
SIZES ?= none,n2,n3,n4
SEEDS ?= 0,1,2,3,4
MORE ?= 0,1,2
STUDENTS := [[dataset=tiny_math],[dataset=tiny_instruct]]
EVALUATE := $(BIN)/python evaluate.py -m experiment=demo
WITHOUT_REPORT := hydra.callbacks.sweep_end.report=false
REPORT = $(BIN)/python -m sdd.report $(DEMO)/jobs --out $(DEMO)
WORKERS ?= 2

# Compiled once, read ever after: a process that imports torch, transformers and peft anew takes twice as long without,
# and several that begin together each compile all of it.
unexport PYTHONDONTWRITEBYTECODE
IMPORTED := peft, pytorch_lightning, lm_eval.evaluator, lm_eval.models.huggingface, matplotlib.pyplot, \
    transformers.models.llama.modeling_llama

.PHONY: env demo arms sizes curve bound more merged analysed criteria test lint clean

env: .venv/.made

.venv/.made: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; set PYTHON=..."; exit 2; }
	@echo "Making .venv from requirements.lock: some minutes, once" >&2
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@$(BIN)/python -c 'import $(IMPORTED)' 2>/dev/null || true
	@touch $@

define BEFORE
What happens now, on a language model of 2.5 million parameters that comes with this project:
  1. Its blocks are scored, and the ones that change its states least are cut out.
  2. The unpruned model rewrites the training answers in its own words.
  3. The pruned model is fine-tuned on those and on the original answers, once for every seed.
  4. All of them answer the same test questions, and the report compares them.
The whole takes five to nine minutes on two cores. What is interrupted goes on where it stopped, and what is there already
is not made again. Lines with [INFO] say what is being built; they need no reading.

endef
define AFTER

That was the question of this project on a small scale. The sentences under "In words" say what came out; in brackets
are 95% intervals, and a difference whose interval holds zero could be chance.

The page with tables, figures and every model's answers side by side; open it in a browser, it needs no network:
    $(CURDIR)/$(DEMO)/report.html
endef
export BEFORE AFTER

# The question on the embedded model: does the pruned student get more back from the model's own rewrites than from the
# references? The unpruned model, the cut at several sizes, both ways of fine-tuning at their tuned rates over five seeds.
# Everything is cached in artifacts/.
demo: env
	@echo "$$BEFORE" >&2
	rm -rf $(DEMO)/jobs
	@$(MAKE) --no-print-directory --jobs 2 arms sizes
	$(REPORT)
	@echo "$$AFTER" >&2

# Side by side; each artifact is built once all the same. The sizes give way, and fill what the arms leave of two cores.
arms: env
	$(EVALUATE) $(WITHOUT_REPORT) seed=$(SEEDS) hydra.sweep.dir=$(DEMO)/jobs/arms $(ARGS)

sizes: env
	nice -n 8 $(EVALUATE) $(WITHOUT_REPORT) pruning=$(SIZES) finetune=none seed=0 hydra.launcher.n_jobs=1 \
	    hydra.sweep.dir=$(DEMO)/jobs/sizes $(ARGS)

# The same with one block fewer and one more, at the same rates.
curve: env
	$(EVALUATE) pruning=n2,n4 finetune=sft,self_distill seed=$(SEEDS) hydra.sweep.dir=$(DEMO)/jobs/curve $(ARGS)

# Right answers in the unpruned model's own style, which only a made-up task has: an upper bound.
bound: env
	$(EVALUATE) finetune=gold seed=$(SEEDS) hydra.sweep.dir=$(DEMO)/jobs/bound $(ARGS)

# What comes after: an upper bound, SFT and self-distillation at other sizes, two students merged, how far each moved the
# student, how well it drafts for its teacher. The last two sweeps run side by side: each waits for one answerer at a time.
more: demo bound curve
	$(MAKE) --jobs 2 merged analysed
	$(REPORT)

merged: env
	$(EVALUATE) seed=$(MORE) finetune=self_distill merge=none,slerp 'merge.students=$(STUDENTS)' \
	    hydra.sweep.dir=$(DEMO)/jobs/merged $(ARGS)

analysed: env
	$(EVALUATE) seed=$(MORE) finetune=sft,self_distill analysis=speculative,shift analysis.repeats=0 \
	    hydra.sweep.dir=$(DEMO)/jobs/analysed $(ARGS)

# What should be cut, and how: the studies whose tables are in LOG.md. Not part of any test; hours on two cores.
criteria: env
	$(BIN)/python evaluate.py -m experiment=criteria hydra.sweep.dir=outputs/criteria/jobs/blocks $(ARGS)
	$(BIN)/python evaluate.py -m experiment=criteria_width hydra.sweep.dir=outputs/criteria/jobs/channels $(ARGS)
	$(BIN)/python -m sdd.report outputs/criteria/jobs --out outputs/criteria \
	    --baseline metric=taylor_width --baseline metric=sdm --baseline metric=angular

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -n $(WORKERS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q $(ARGS)

clean:
	rm -rf artifacts outputs
