"""Whether the stages run at the sizes of 7 to 9 billion parameters, and what they take, without a GPU or weights.

    python -m benchmarks.shapes [--models NAME ...] [--stages NAME ...] [--records outputs/shapes.json]

Each stage's own code runs on a GPU that is not there (`fake_gpu`), on models made from the sizes in `conf/model/*.yaml`
and rows of the usual lengths. The peak of memory by what holds it, and FLOPs, stand beside what the formulas of
`sdd/planning/estimates.py` say of the same work. Two and three blocks are traced, and every further one counts as the
third. What was traced is kept in `--records`, so that a run goes on where it stopped. Seconds are not measured, nor is
what only a real GPU shows. Checkpoints are cut, narrowed and copied as bytes: no tensor is made of them.
"""

import argparse
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import numpy as np
import torch
import yaml
from pytorch_lightning.accelerators import CUDAAccelerator
from tqdm import tqdm

from benchmarks.fake_gpu import CUDA, Trace, on_fake_gpu
from sdd.architectures import attention_for, stock_config
from sdd.planning import estimates
from sdd.planning.cost_model import BYTES, CostModel, Device, shape_of
from sdd.planning.estimates import PROCESS, Estimate, Task, Training
from sdd.planning.fits import GPUS

MODELS: dict[str, dict[str, Any]] = {
    "llama3.1_8b_instruct": {},
    "qwen3_8b": {},
    "gemma2_9b_instruct": {},
    "mistral_7b_v0.3_instruct": {"sliding_window": None},
}
"""What the options' sizes leave to the checkpoint's own config."""
LORA_RANK = 16
LORA = {"rank": LORA_RANK, "alpha": 32, "dropout": 0.0, "targets": ["all-linear"]}
COUNTING = Device("an operation a second", {2: 1.0, 4: 2.0}, inf, inf, block_seconds=0.0, start_seconds=0.0)
"""Where an estimate's seconds are its FLOPs, and nothing else takes time; those in float64 count as twice 32 bits."""
MICRO_BATCH, BATCH, TEXTS, FEW_TEXTS, TEXT_LENGTH = 4096, 32, 16, 4, 1024
LEFT_OUT = {("rewrites", "gemma2_9b_instruct"), ("repaired, ridge", "gemma2_9b_instruct")}
LEFT_OUT |= {("rewrites, by transformers", name) for name in MODELS if name != "gemma2_9b_instruct"}
"""Gemma 2's windows are left to transformers' own generation, and its norm behind the MLP cannot be refitted."""
WIDENED = {
    "scores, SDM": "SDM widens one matrix of an MLP at a time",
    "exported, LoRA": "an adapter is merged into one widened matrix of a block at a time",
}
"""Where frozen 16-bit weights are held in float32 on purpose: matrices of an MLP, or of a block, and no others."""
ON_CPU = {
    "repaired, ridge": "a repair adds its change to the stored matrix on the CPU, in float64",
    "merged, SLERP": "a merge is made on the CPU, one matrix of an MLP at a time",
}
"""Where large tensors are computed with on the CPU on purpose: at most two matrices of an MLP, 8 bytes a number."""
ROW, PROMPT = 256, 120
"""Tokens of a fine-tuning row, and of its prompt."""
REWRITTEN, LONGEST, SAID = 210, 128, 3
"""Tokens of a prompt of rewriting, that an answer may have, and that it has."""
KEPT = 64
"""Tokens of a distribution that are kept."""
QUESTIONS, CHOICES, QUESTION, CHOICE = 8, 4, 1160, 10
"""Items of an evaluation, choices of each, and the tokens of both."""


class FakeGPU(CUDAAccelerator):
    """What Lightning asks of an accelerator."""

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [CUDA] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    def setup_device(self, device: torch.device) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None: ...


@dataclass(frozen=True)
class Case:
    """A model option, with all of its blocks or the first of them."""

    name: str
    blocks: int | None = None

    @property
    def sizes(self) -> dict[str, Any]:
        option = Path(__file__).resolve().parents[1] / "conf" / "model" / f"{self.name}.yaml"
        shape: dict[str, Any] = yaml.safe_load(option.read_text())["shape"]
        return shape | MODELS[self.name] | ({} if self.blocks is None else {"num_hidden_layers": self.blocks})

    @property
    def cost_model(self) -> CostModel:
        shape = shape_of(self.sizes)
        return CostModel(shape, shape.blocks, BYTES["bfloat16"], COUNTING)

    def model(self, trace: Trace, dtype: str = "bfloat16", device: Any = CUDA) -> Any:
        """As `Checkpoint.model` opens it, from sizes alone."""
        from transformers import AutoModelForCausalLM

        config = stock_config(self.sizes, self.name)
        with trace.making("weights"), torch.device(device):
            attention = attention_for(config, "sdpa")
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
        trace.restart()
        return model.eval()


def lengths(count: int, longest: int) -> list[int]:
    """Of rows of a batch: they differ, so that there is padding."""
    return [longest - index % 8 for index in range(count)]


# ---- stages ---------------------------------------------------------------------------------------------------------


def scores(case: Case, trace: Trace, criterion: Any = None) -> None:
    """States of every block of one batch of calibration texts."""
    from sdd.forward.batches import show_texts
    from sdd.importance.states import Angular

    model, criterion = case.model(trace), criterion or Angular()
    criterion.start(model.config.num_hidden_layers)
    show_texts(model, criterion, [[1] * length for length in lengths(TEXTS, TEXT_LENGTH)], TEXTS)
    criterion.scores()


def influence(case: Case, trace: Trace) -> None:
    from sdd.importance.states import BlockInfluence

    scores(case, trace, BlockInfluence())


def tuned(case: Case, trace: Trace, adapter: dict[str, Any], recomputed: bool = False, taught: bool = False) -> None:
    """Two steps of fine-tuning by the stage's own trainer, so that the second has the optimiser's moments.

    Where all is trained a step has two passes, so that the second has the gradients of the first.
    """
    from sdd.finetuning.adapters import adapted
    from sdd.finetuning.losses.forward_kl import ForwardKL
    from sdd.finetuning.losses.weighted import Weighted
    from sdd.finetuning.module import TrainingRow, loss_sum
    from sdd.models.checkpoints import check_logits, recompute_activations
    from sdd.stages.runtime import Runtime
    from sdd.stages.tuned import _fit
    from sdd.store import Recipe

    whole = adapter.get("method") == "full"
    batch = rows_of_a_step(whole)
    model = case.model(trace, "float32" if whole else "bfloat16")
    check_logits(model)
    with trace.making("trained"):
        student = adapted(model, adapter, None)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    trace.tag(trained, "trained")
    if recomputed:
        recompute_activations(model)
    followed: list[Any] = []

    def loss(model: Any, rows: Any, device: Any) -> Any:
        if not followed:  # what asked before the model was moved has gone with it
            followed.extend(parameter for parameter in model.parameters() if parameter.requires_grad)
            for parameter in followed:
                parameter.register_post_accumulate_grad_hook(lambda p: trace.tag([p.grad], "gradients"))
        return loss_sum(model, rows, device)

    taught_loss = Weighted([(1.0, ForwardKL())], case.model(trace).requires_grad_(False)) if taught else None
    rows = [TrainingRow([1] * length, PROMPT) for length in lengths(2 * batch, ROW)]
    finetune = {"learning_rate": 1e-4, "weight_decay": 0.0, "warmup_share": 0.05, "clip_norm": 1.0}
    spec = {"adapter": adapter, "base_quantisation": None, "precision": "bf16", "system_prompt": None, "seed": 0}
    spec |= {"finetune": finetune | {"batch_size": batch, "epochs": 1, "max_length": ROW}}
    recipe = Recipe("tuned", 1, spec, {"targets": Recipe("targets", 1, {"mode": "sft"})})
    runtime = Runtime(accelerator=FakeGPU(), micro_batch_tokens=MICRO_BATCH)  # type: ignore[arg-type]
    trace.restart()
    with tempfile.TemporaryDirectory() as scratch:
        _fit(student, None, taught_loss or loss, rows, [], recipe, runtime, Path(scratch))


def rows_of_a_step(whole: bool) -> int:
    return (2 if whole else 1) * MICRO_BATCH // ROW


def perplexity(case: Case, trace: Trace) -> None:
    """Every block left out in turn, on one batch of calibration texts."""
    from sdd.forward.bypass import Row
    from sdd.importance.removal import Perplexity

    model, criterion = case.model(trace), Perplexity()
    blocks = model.config.num_hidden_layers
    criterion.start(blocks)
    texts = [Row([1] * length) for length in lengths(FEW_TEXTS, TEXT_LENGTH)]
    criterion.measure(model, texts, TEXTS)


def channels(case: Case, trace: Trace) -> None:
    """Both losses of SDMPrune on one pass of calibration texts."""
    from sdd.importance.sample_gradients import Distillation, channel_importance

    model = case.model(trace)
    texts, width = lengths(FEW_TEXTS, TEXT_LENGTH), model.config.intermediate_size
    masked = [torch.arange(width) < width // 40 for _ in range(model.config.num_hidden_layers)]
    channel_importance(model, [[1] * length for length in texts], MICRO_BATCH, Distillation(0.1, 0.2, masked))


def rewrites(case: Case, trace: Trace) -> None:
    """A full batch of prompts is read, and some tokens are said to them; room is made for all."""
    from sdd.forward.decoding import decode, keeps_all

    model = case.model(trace)
    assert keeps_all(model), "its windows are left to transformers' own generation"
    prompts = [[2 + index, *[1] * (length - 1)] for index, length in enumerate(lengths(BATCH, REWRITTEN))]

    def ending(tokens: list[int], new: int) -> int | None:
        return SAID if len(tokens) >= SAID else None

    assert len(list(decode(model, prompts, LONGEST, {1}, BATCH, ending=ending))) == BATCH


def generated(case: Case, trace: Trace) -> None:
    """The same prompts by transformers' own generation, up to as many tokens as are said; its cache grows with them."""
    from sdd.rewriting.engines import HFEngine, Request

    model, engine = case.model(trace), HFEngine(max_new_tokens=SAID)
    model.generation_config.eos_token_id = None  # no token is known, so that each would be taken for the last
    engine.take(model, SimpleNamespace(pad_token_id=0), None, BATCH)
    requests, rows = [Request(str(row), "") for row in range(BATCH)], [[1] * one for one in lengths(BATCH, REWRITTEN)]
    answers = dict(engine._generated(requests, rows, None))  # type: ignore[arg-type]
    assert [len(answer) for answer in answers.values()] == [SAID] * BATCH


def given_rows() -> list[tuple[list[int], list[int]]]:
    return [([1] * PROMPT, [1] * (length - PROMPT)) for length in lengths(BATCH, ROW)]


def surprisals(case: Case, trace: Trace) -> None:
    """A batch of targets is shown, as in `damaged`."""
    from sdd.analysis.shift import token_nll

    token_nll(case.model(trace), given_rows(), BATCH)


def drafted(case: Case, trace: Trace) -> None:
    """A batch of answers is shown to the student, and then to both; the student is as large."""
    from sdd.analysis.speculative import greedy_matches, sampling_acceptance

    teacher, student = case.model(trace), case.model(trace)
    greedy_matches(student, given_rows(), BATCH)
    sampling_acceptance(teacher, student, given_rows(), BATCH, 1.0)


def taught(case: Case, trace: Trace) -> None:
    """The likeliest tokens of a batch of targets."""
    from sdd.stages.runtime import Runtime
    from sdd.stages.taught import Taught, _said

    spec = Taught(case.name, "bfloat16", None, ROW, "top_k", KEPT)
    model, names = case.model(trace), [str(row) for row in range(BATCH)]
    with patch.object(torch.Tensor, "numpy", lambda tensor: np.zeros(tensor.shape)):
        _said(model, spec, names, given_rows(), model.config.vocab_size, Runtime(inference_batch_size=BATCH))


def evaluated(case: Case, trace: Trace) -> None:
    """Likelihoods of four choices to each of some questions, each after examples of its own."""
    from sdd.evaluation.likelihoods import _Walk
    from sdd.evaluation.prefixes import prefix_tree
    from sdd.forward.parts import Parts

    model, pairs = case.model(trace), [(item, choice) for item in range(QUESTIONS) for choice in range(CHOICES)]
    rows = [(*[20 + item] * QUESTION, *[2 + choice] * CHOICE) for item, choice in pairs]
    walk = _Walk(model, [1] * (CHOICE * len(rows)), None, Parts())
    with tqdm(disable=True) as progress:
        walk.run(prefix_tree([row[:-1] for row in rows], [CHOICE] * len(rows)), QUESTIONS * len(rows[0]), progress)


def repaired(case: Case, trace: Trace) -> None:
    """The projection before a cut, fitted on one pass of texts and looked at on another."""
    from sdd.pruning.repair import Cut, Passes, _refit

    model = case.model(trace)
    blocks, sizes = model.config.num_hidden_layers, model.config
    stored = torch.empty(sizes.hidden_size, sizes.intermediate_size, dtype=torch.bfloat16, device="cpu")
    texts = [[1] * length for length in lengths(TEXTS, TEXT_LENGTH)]
    passes, cut = Passes(model, None, TEXTS), Cut(blocks - 2, blocks - 2, blocks)
    _refit(passes, cut, "mlp.down_proj", [stored], (texts, texts[:3]), 0.01)


def merged(case: Case, trace: Trace) -> None:
    """The largest matrix that LoRA changes, of two students at a small angle as light adapters have, on the CPU."""
    from sdd.merging import streaming
    from sdd.merging.students import AdapterStudent

    hidden, inner = (case.sizes[key] for key in ("hidden_size", "intermediate_size"))

    class File:
        def get_tensor(self, key: str) -> Any:
            if key == "up":
                return torch.empty(inner, hidden, dtype=torch.bfloat16)
            return torch.empty((LORA_RANK, hidden) if ".lora_A." in key else (inner, LORA_RANK))

    student = AdapterStudent.__new__(AdapterStudent)
    student.name, student.scaling, student.file, student.copies = "student", 2.0, File(), {}
    student.factors = {"up": "up.lora_A.weight"}
    method = {"method": "slerp", "space": "weights"}
    with patch.object(streaming, "angle", lambda *_: 1e-3):
        streaming._read_and_merged(File(), "up", None, [student, student], method, 0.5)


def exported(case: Case, trace: Trace) -> None:
    """A student's adapter is merged into its base, in 16 bits; that is done in the machine's memory, a GPU or not."""
    from peft import PeftModel

    from sdd.finetuning import adapters

    base = case.model(trace)
    with trace.making("trained"):
        student = adapters.adapted(base, LORA, None)
    with (
        patch.object(adapters, "check_adapter", lambda *_: {}),
        patch.object(adapters, "view", lambda folder, _: nullcontext(folder)),
        patch.object(PeftModel, "from_pretrained", lambda *_: student),
    ):
        adapters.merged(base, Path("adapter"), "bfloat16")


ON_HOST = ("merged, SLERP", "exported, LoRA")
"""What takes the machine's memory, and no GPU's."""
STAGES: dict[str, Callable[[Case, Trace], None]] = {
    "scores, angular": scores,
    "scores, block influence": influence,
    "scores, perplexity": perplexity,
    "scores, SDM": channels,
    "repaired, ridge": repaired,
    "rewrites": rewrites,
    "rewrites, by transformers": generated,
    "tuned, LoRA": lambda case, trace: tuned(case, trace, LORA),
    "tuned, LoRA, recomputed": lambda case, trace: tuned(case, trace, LORA, recomputed=True),
    "tuned, full": lambda case, trace: tuned(case, trace, {"method": "full"}),
    "tuned, logit distillation": lambda case, trace: tuned(case, trace, LORA, taught=True),
    "evaluated, likelihoods": evaluated,
    "surprisals, damaged": surprisals,
    "drafted": drafted,
    "taught": taught,
    "merged, SLERP": merged,
    "exported, LoRA": exported,
}


def traced(stage: str, case: Case) -> Trace:
    with on_fake_gpu() as trace:
        STAGES[stage](case, trace)
    return trace


# ---- the same work by the formulas ----------------------------------------------------------------------------------


def tuned_by_formula(
    cost_model: CostModel, whole: bool = False, recomputed: bool = False, taught: bool = False
) -> Estimate:
    shape, batch = cost_model.shape, rows_of_a_step(whole)
    lora = estimates.adapter_parameters(shape, cost_model.blocks, LORA_RANK, ["all-linear"])
    training = Training(shape.parameters(cost_model.blocks) if whole else lora, whole=whole, recomputed=recomputed)
    teacher = cost_model if taught else None
    return estimates.tuned(cost_model, training, 2 * batch, ROW, batch, MICRO_BATCH, teacher)


def rewrites_by_formula(cost_model: CostModel) -> Estimate:
    """Of answers as short as those that were traced, where there is room for longer ones."""
    said, longest = (
        estimates.rewrites(cost_model, BATCH, REWRITTEN, new, new, BATCH, BATCH) for new in (SAID, LONGEST)
    )
    return replace(said, memory=longest.memory)


def evaluated_by_formula(cost_model: CostModel) -> Estimate:
    task = Task(QUESTIONS, CHOICES, QUESTION + CHOICE, choice=CHOICE)
    return estimates.evaluated(cost_model, [task], None, QUESTIONS)


def perplexity_by_formula(cost_model: CostModel) -> Estimate:
    from sdd.importance.removal import Perplexity

    runs = Perplexity().runs(cost_model.blocks)
    return estimates.scores(cost_model, FEW_TEXTS, TEXT_LENGTH, TEXTS, *runs)


def scores_by_formula(cost_model: CostModel) -> Estimate:
    return estimates.scores(cost_model, TEXTS, TEXT_LENGTH, TEXTS)


FORMULAS: dict[str, Callable[[CostModel], Estimate]] = {
    "scores, angular": scores_by_formula,
    "scores, block influence": scores_by_formula,
    "scores, perplexity": perplexity_by_formula,
    "scores, SDM": lambda model: estimates.gradient_scores(model, FEW_TEXTS, TEXT_LENGTH, MICRO_BATCH, 2),
    "repaired, ridge": lambda model: estimates.repaired(model, model, TEXTS, TEXT_LENGTH, TEXTS),
    "rewrites": rewrites_by_formula,
    "rewrites, by transformers": lambda model: estimates.rewrites(model, BATCH, REWRITTEN, SAID, SAID, BATCH, BATCH),
    "tuned, LoRA": tuned_by_formula,
    "tuned, LoRA, recomputed": lambda model: tuned_by_formula(model, recomputed=True),
    "tuned, full": lambda model: tuned_by_formula(model, whole=True),
    "tuned, logit distillation": lambda model: tuned_by_formula(model, taught=True),
    "evaluated, likelihoods": evaluated_by_formula,
    "surprisals, damaged": lambda model: estimates.given(model, BATCH, ROW, BATCH),
    "drafted": lambda model: estimates.drafted(model, BATCH, ROW, BATCH),
    "taught": lambda model: estimates.taught(model, BATCH, ROW, BATCH),
    "merged, SLERP": lambda model: estimates.merged(model, model, 2, in_full=False, method="slerp"),
    "exported, LoRA": lambda model: Estimate(0.0, PROCESS + model.weights),
}
"""Where seconds are operations: see `COUNTING`."""


# ---- the table ------------------------------------------------------------------------------------------------------

PAGE = """# What fits on one GPU

Written by `python -m benchmarks.shapes --out docs/shapes.md`, on a machine without a GPU. Each stage's own code ran
on tensors without memory, at the sizes that `conf/model/*.yaml` state, unpruned: two and three blocks were traced,
and every further one counts as the third. Passes: 16 texts of 1,024 tokens for scores (4 for `perplexity` and `SDM`)
and repair, 4,096 tokens of rows of 256 for fine-tuning, 32 prompts of 210 tokens and 128 new ones for rewrites, 32
requests of 1,170 tokens for likelihoods: four choices to each of eight questions. Given answers (`surprisals`,
`damaged`, `drafted`, `taught`) are 32 rows of 256 tokens.

{exceptions}

An operation on tensors of two devices raises, as on a GPU. "by formula" is how far the estimate of a dry run
(`sdd/planning/estimates.py`) is from the trace: of memory, and of matrix products. A GPU of N GB counts as N * 1e9
bytes; what a GiB has more is left to the CUDA context and to fragments. To what was traced of a merge and of an export
the 0.3 GB of the process are added. An export, which is no stage and of which no dry run tells, opens the student in
the machine's memory; its adapter was merged on the device that is not there, files neither read nor written. Not traced
are cuts, which copy bytes and make no tensor, but for the repair.

What was run is the part of a stage that computes, on one batch each: the passes of scores, two steps by the stage's own
trainer, the refit of one projection, the merge of one matrix. Gemma 2's windows are left to transformers' own
generation, whose cache grows token by token: as many were said as are counted, 3. Its repair is refused: the norm
behind its MLP cannot be refitted. The row of an evaluation is of likelihoods; tasks that generate were not traced, and
go by the formula of rewrites. `damaged` shows its rows as `surprisals` does; a student of `drafted` counts as large as
the unpruned model.

A dry run goes by formulas and not by traces: it answers in seconds and loads no torch, where the traces of this page
take three minutes. A test holds every formula to within 20% of every row of this table.

What only a GPU shows is not measured: kernels and their workspaces, bandwidth, seconds, whether results are right in
bfloat16. Autocast was told by rule, not by torch's own; attention is the kernel that a CUDA build would choose. 4-bit
bases were not traced. `trainer.micro_batch_tokens`, `trainer.inference_batch_size`, `evaluation.batch_size` and
`engine.batch_size` may be `auto`: the largest power of two that the estimates let into 80% of what is free. What does
not fit after all is passed in halves, which a line in the log tells. Not halved are likelihoods above the point where
ranks part, `taylor`, ridge repair, own criteria, and training in shards. Both were shown by made-up sizes and simulated
failures alone, on no GPU.
"""

PLANNED_PAGE = """
## What a dry run says

Of `experiment=paper/cell` with the model and what the first column adds: 6 of 32 blocks gone, or as large a share,
GSM8K's rows at up to 1,024 tokens, 4,096 tokens a training pass. "yes": as it is. A setting is the fastest of those
that fit by the same formulas: `trainer.micro_batch_tokens` and `trainer.gradient_checkpointing` in fine-tuning, sizes
of batches elsewhere. They change no result beyond rounding, and with dropout its draws. "no": none of them helps;
where a smaller `finetune.max_length` would, which leaves rows out, it is named. Every dry run with `trainer=gpu` says
this of its own stages, a sweep of all.

Only the stages above were traced, in 16 bits. What `answered`, `shifted` and `measured` take follows from the same
passes, and was held to no trace of its own; like `drafted` they are in float32, unless `analysis.dtype` says otherwise.
A base in 4 bits and training of head and norms were not traced. Stages without a
model's passes (`pruned` without a repair, `targets`, `merged`) ask for no GPU, nor do those that a server computes:
a dry run gives them no memory of a model's, and of the time it says that it is the server's.
"""
PLANNED = {
    "scores, angular": ("scores", []),
    "scores, perplexity": ("scores", ["metric=perplexity"]),
    "scores, SDM": ("scores", ["metric=sdm", "pruning=mlp20", "finetune=none"]),
    "pruned, ridge": ("pruned", ["repair=ridge", "finetune=none"]),
    "rewrites": ("rewrites", []),
    "tuned, LoRA": ("tuned", []),
    "tuned, LoRA in 4 bits": ("tuned", ["adapter=qlora"]),
    "tuned, head and norms": ("tuned", ["adapter=head_and_norms"]),
    "tuned, full": ("tuned", ["adapter=full"]),
    "tuned, logit distillation": ("tuned", ["finetune=logit_distill"]),
    "tuned, the same from kept logits": ("tuned", ["finetune=logit_distill", "finetune.cached=top_k"]),
    "taught": ("taught", ["finetune=logit_distill", "finetune.cached=top_k"]),
    "evaluated, OpenLLM v1": ("evaluated", []),
    "drafted": ("drafted", ["analysis=speculative"]),
    "measured": ("measured", ["analysis=cost"]),
}
"""What is asked of the cell besides, and the stage that is meant; of several artifacts the one that takes the most."""


def planned() -> list[str]:
    """A line a stage and model."""
    from hydra import compose, initialize_config_dir

    from sdd.cli.app import config_folder
    from sdd.stages import graph
    from sdd.stages.dry_run import estimate, fitting, written
    from sdd.stages.sizes import Sizes
    from sdd.study import Study

    lines = [
        f"| stage | model | GB | {' | '.join(f'{gpu} GB' for gpu in GPUS)} |",
        "|---|---|---|" + "---|" * len(GPUS),
    ]
    for what, (stage, more) in PLANNED.items():
        for name in MODELS:
            if (what, name) == ("pruned, ridge", "gemma2_9b_instruct"):
                continue
            with (
                initialize_config_dir(str(config_folder()), version_base="1.3"),
                tempfile.TemporaryDirectory() as folder,
            ):
                config = compose("config", ["experiment=paper/cell", f"model={name}", "dry_run=true", *more])
                study = Study(config, Path(folder))
                wanted, sizes = graph.wanted(study, "evaluate"), Sizes(study)
                assert wanted is not None
                recipes = [recipe for recipe in wanted.walk() if recipe.stage == stage]
                needed, recipe = max(((estimate(sizes, one), one) for one in recipes), key=lambda pair: pair[0].memory)
                fits = fitting(sizes, recipe, needed)
            cells = ["no" if fits[gpu] is None else f"`{written(fits[gpu])}`" if fits[gpu] else "yes" for gpu in GPUS]
            lines.append(f"| {what} | {name} | {needed.memory / 1e9:.1f} | {' | '.join(cells)} |")
    return lines


Record = dict[str, Any]
"""Bytes at the peak by kind, bytes on the host, FLOPs, weights widened, bytes computed with on the CPU."""


def record(stage: str, case: Case) -> Record:
    trace = traced(stage, case)
    return {
        "peak": trace.peak,
        "host": trace.host_peak,
        "flops": trace.flops,
        "widened": dict(trace.widened),
        "on_cpu": dict(trace.on_cpu),
    }


def extended(two: Record, three: Record, blocks: int) -> Record:
    """Of so many blocks: every further one takes what the third does."""

    def at(first: float, second: float) -> float:
        return first + (blocks - 2) * (second - first)

    kinds = two["peak"].keys() | three["peak"].keys()
    peak = {kind: at(two["peak"].get(kind, 0), three["peak"].get(kind, 0)) for kind in kinds}
    numbers = {key: at(two[key], three[key]) for key in ("host", "flops")}
    return {"peak": peak, **numbers, "widened": three["widened"], "on_cpu": three["on_cpu"]}


def exceptions(records: dict[str, Record]) -> list[str]:
    """Why frozen weights were widened and the CPU was computed on, where that is meant; else it ends in an error."""
    found: dict[str, None] = {}
    for key, one in records.items():
        name, stage, _ = key.split("|")
        sizes = Case(name).sizes
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        shapes = [(hidden, inner), *(Case(name).cost_model.shape.linear.values() if stage in ON_HOST else ())]
        meant = {str(shape) for a, b in shapes for shape in ((a, b), (b, a))} if stage in WIDENED else set()
        if strange := one["widened"].keys() - meant:
            raise SystemExit(f"{key}: frozen 16-bit weights are held in float32, of the shapes {sorted(strange)}")
        on_cpu = sum(one["on_cpu"].values())
        if on_cpu > (2 * 8 * hidden * inner if stage in ON_CPU else 0):
            raise SystemExit(f"{key}: {on_cpu / 1e9:.2f} GB are computed with on the CPU: {one['on_cpu']}")
        found |= {WIDENED[stage]: None} if one["widened"] else {}
        found |= {ON_CPU[stage]: None} if on_cpu else {}
    return list(found)


def exceptions_told(records: dict[str, Record]) -> str:
    """A paragraph for the page."""
    told = "No frozen 16-bit weight was held in float32, and no large matrix was multiplied on the CPU or moved to it"
    reasons = exceptions(records)
    whole = f"{told}, but for what is meant: {'; '.join(reasons)}." if reasons else f"{told}."
    return textwrap.fill(f"{whole} The script ends in an error where anything else is.", 119)


def table(records: dict[str, Record]) -> list[str]:
    """A line a model and stage; bytes are those of the GPU, or where none is needed those of the machine."""
    lines = ["| model | stage | traced, GB | of which | by formula | TFLOP | by formula | fits in |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        for stage in STAGES:
            pair = [records.get(f"{name}|{stage}|{blocks}") for blocks in (2, 3)]
            if None in pair:
                continue
            cost_model = Case(name).cost_model
            one = extended(*pair, cost_model.blocks)  # type: ignore[arg-type]
            formula = FORMULAS[stage](cost_model)
            on_host, on_gpu = stage in ON_HOST, sum(one["peak"].values())
            traced_bytes = max(one["host"], on_gpu) + PROCESS if on_host else on_gpu
            by_kind = sorted(one["peak"].items(), key=lambda pair: (-pair[1], pair[0]))
            parts = "" if on_host else ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in by_kind if size > 5e7)
            sizes = [str(size) for size in GPUS if traced_bytes <= size * 1e9]
            fits = "no GPU needed" if on_host else ", ".join(sizes) or "none"
            apart, more = formula.memory / traced_bytes - 1, formula.seconds / max(one["flops"], 1) - 1
            known = not on_host and stage != "scores, perplexity"  # they grow with the square of the blocks
            lines.append(
                f"| {name} | {stage} | {traced_bytes / 1e9:.1f} | {parts} | {apart:+.0%} | "
                + (f"{one['flops'] / 1e12:.0f} | {more:+.0%} | " if known else "| | ")
                + f"{fits} |"
            )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--records", type=Path, default=Path("outputs/shapes.json"), help="what was traced before")
    parser.add_argument("--out", type=Path, help="docs/shapes.md")
    given = parser.parse_args()
    records: dict[str, Record] = json.loads(given.records.read_text()) if given.records.is_file() else {}
    given.records.parent.mkdir(parents=True, exist_ok=True)
    for name in given.models:
        for stage in given.stages:
            for blocks in (2, 3):
                key = f"{name}|{stage}|{blocks}"
                if key in records or (stage, name) in LEFT_OUT:
                    continue
                records[key] = record(stage, Case(name, blocks))
                given.records.write_text(json.dumps(records, indent=1) + "\n")
                print(f"{key}: traced", file=sys.stderr, flush=True)
    page = PAGE.replace("{exceptions}", exceptions_told(records))
    lines = [*table(records), PLANNED_PAGE, *planned()]
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join([page, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
