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
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}

import torch
import yaml
from pytorch_lightning.accelerators import CUDAAccelerator
from tqdm import tqdm

from benchmarks.fake_gpu import CUDA, Trace, on_fake_gpu
from sdd.architectures import attention_for, stock_config
from sdd.planning import estimates
from sdd.planning.cost_model import BYTES, CostModel, Device, shape_of
from sdd.planning.estimates import Estimate, Task, Training

MODELS = {
    "llama3.1_8b_instruct": {"model_type": "llama"},
    "qwen3_8b": {"model_type": "qwen3"},
    "gemma2_9b_instruct": {"model_type": "gemma2"},
    "mistral_7b_v0.3_instruct": {"model_type": "mistral", "sliding_window": None},
}
"""What the options' sizes leave to the checkpoint's own config."""
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": ["all-linear"]}
COUNTING = Device("an operation a second", {2: 1.0, 4: 2.0}, inf, inf, block_seconds=0.0, start_seconds=0.0)
"""Where an estimate's seconds are its FLOPs, and nothing else takes time; those in float64 count as twice 32 bits."""
MICRO_BATCH, BATCH, TEXTS, TEXT_LENGTH = 4096, 32, 16, 1024
GPUS = (24, 48, 80)
"""GB of memory, 1e9 bytes each: what a GiB has more is left for the CUDA context and for fragments."""
LEFT_OUT = {("rewrites", "gemma2_9b_instruct"), ("repaired, ridge", "gemma2_9b_instruct")}
"""Gemma 2's windows are left to transformers' own generation, and its norm behind the MLP cannot be refitted."""
ROW, PROMPT = 256, 120
"""Tokens of a fine-tuning row, and of its prompt."""


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


def scores(case: Case, trace: Trace, criterion: Any = None) -> Estimate:
    """States of every block of one batch of calibration texts."""
    from sdd.forward.batches import show_texts
    from sdd.importance.states import Angular

    model, criterion = case.model(trace), criterion or Angular()
    criterion.start(model.config.num_hidden_layers)
    show_texts(model, criterion, [[1] * length for length in lengths(TEXTS, TEXT_LENGTH)], TEXTS)
    criterion.scores()
    return estimates.scores(case.cost_model, TEXTS, TEXT_LENGTH, TEXTS)


def influence(case: Case, trace: Trace) -> Estimate:
    from sdd.importance.states import BlockInfluence

    return scores(case, trace, BlockInfluence())


def tuned(
    case: Case, trace: Trace, adapter: dict[str, Any], recomputed: bool = False, taught: bool = False
) -> Estimate:
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
    batch = (2 if whole else 1) * MICRO_BATCH // ROW
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
    cost_model = case.cost_model
    training = Training(sum(parameter.numel() for parameter in trained), whole=whole, recomputed=recomputed)
    settings = cost_model, training, len(rows), ROW, batch, MICRO_BATCH, cost_model if taught else None
    return estimates.tuned(*settings)


def perplexity(case: Case, trace: Trace) -> Estimate:
    """Every block left out in turn, on one batch of calibration texts."""
    from sdd.forward.bypass import Row
    from sdd.importance.removal import Perplexity

    model, criterion = case.model(trace), Perplexity()
    blocks = model.config.num_hidden_layers
    criterion.start(blocks)
    texts = [Row([1] * length) for length in lengths(4, TEXT_LENGTH)]
    criterion.measure(model, texts, TEXTS)
    return estimates.scores(case.cost_model, len(texts), TEXT_LENGTH, TEXTS, *criterion.runs(blocks))


def channels(case: Case, trace: Trace) -> Estimate:
    """Both losses of SDMPrune on one pass of calibration texts."""
    from sdd.importance.sample_gradients import Distillation, channel_importance

    model = case.model(trace)
    texts, width = lengths(4, TEXT_LENGTH), model.config.intermediate_size
    masked = [torch.arange(width) < width // 40 for _ in range(model.config.num_hidden_layers)]
    channel_importance(model, [[1] * length for length in texts], MICRO_BATCH, Distillation(0.1, 0.2, masked))
    return estimates.gradient_scores(case.cost_model, len(texts), TEXT_LENGTH, MICRO_BATCH, 2)


def rewrites(case: Case, trace: Trace) -> Estimate:
    """A full batch of prompts is read, and some tokens are said to them; room is made for all."""
    from sdd.forward.decoding import decode, keeps_all

    model, prompt, longest, said = case.model(trace), 210, 128, 3
    assert keeps_all(model), "its windows are left to transformers' own generation"
    prompts = [[2 + index, *[1] * (length - 1)] for index, length in enumerate(lengths(BATCH, prompt))]

    def ending(tokens: list[int], new: int) -> int | None:
        return said if len(tokens) >= said else None

    assert len(list(decode(model, prompts, longest, {1}, BATCH, ending=ending))) == BATCH
    memory = estimates.rewrites(case.cost_model, BATCH, prompt, longest, longest, BATCH, BATCH).memory
    return replace(estimates.rewrites(case.cost_model, BATCH, prompt, said, said, BATCH, BATCH), memory=memory)


def evaluated(case: Case, trace: Trace) -> Estimate:
    """Likelihoods of four choices to each of some questions, each after examples of its own."""
    from sdd.evaluation.likelihoods import _Walk
    from sdd.evaluation.prefixes import prefix_tree

    model, batch, choice = case.model(trace), 8, 10
    rows = [(*[20 + question] * 1160, *[2 + answer] * choice) for question in range(batch) for answer in range(4)]
    walk = _Walk(model, [1] * (choice * len(rows)), None)
    with tqdm(disable=True) as progress:
        walk.run(prefix_tree([row[:-1] for row in rows], [choice] * len(rows)), batch * len(rows[0]), progress)
    return estimates.evaluated(case.cost_model, [Task(batch, 4, len(rows[0]))], None, batch)


def repaired(case: Case, trace: Trace) -> Estimate:
    """The projection before a cut, fitted on one pass of texts and looked at on another."""
    from sdd.pruning.repair import Cut, Passes, _refit

    model = case.model(trace)
    blocks, sizes = model.config.num_hidden_layers, model.config
    stored = torch.empty(sizes.hidden_size, sizes.intermediate_size, dtype=torch.bfloat16, device="cpu")
    texts = [[1] * length for length in lengths(TEXTS, TEXT_LENGTH)]
    passes, cut = Passes(model, None, TEXTS), Cut(blocks - 2, blocks - 2, blocks)
    _refit(passes, cut, "mlp.down_proj", [stored], (texts, texts[:3]), 0.01)
    return estimates.repaired(case.cost_model, case.cost_model, TEXTS, TEXT_LENGTH, TEXTS)


def merged(case: Case, trace: Trace) -> Estimate:
    """The largest matrix that LoRA changes, of two students, on the CPU."""
    from sdd.merging.streaming import merge_tensor
    from sdd.merging.students import AdapterStudent

    hidden, inner = (case.sizes[key] for key in ("hidden_size", "intermediate_size"))

    class File:
        def get_tensor(self, key: str) -> Any:
            return torch.empty((LORA["rank"], hidden) if ".lora_A." in key else (inner, LORA["rank"]))

    student = AdapterStudent.__new__(AdapterStudent)
    student.name, student.scaling, student.file, student.copies = "student", 2.0, File(), {}
    student.factors = {"up": "up.lora_A.weight"}
    base = torch.empty(inner, hidden, dtype=torch.bfloat16)
    method = {"method": "slerp", "space": "weights"}
    merge_tensor(base, [student.read("up", base) for _ in range(2)], method, 0.5)
    return estimates.merged(case.cost_model, case.cost_model, 2, in_full=False)


STAGES: dict[str, Callable[[Case, Trace], Estimate]] = {
    "scores, angular": scores,
    "scores, block influence": influence,
    "scores, perplexity": perplexity,
    "scores, SDM": channels,
    "repaired, ridge": repaired,
    "rewrites": rewrites,
    "tuned, LoRA": lambda case, trace: tuned(case, trace, LORA),
    "tuned, LoRA, recomputed": lambda case, trace: tuned(case, trace, LORA, recomputed=True),
    "tuned, full": lambda case, trace: tuned(case, trace, {"method": "full"}),
    "tuned, logit distillation": lambda case, trace: tuned(case, trace, LORA, taught=True),
    "evaluated, likelihoods": evaluated,
    "merged, SLERP": merged,
}


def traced(stage: str, case: Case) -> tuple[Trace, Estimate]:
    with on_fake_gpu() as trace:
        estimate = STAGES[stage](case, trace)
    return trace, estimate


# ---- the table ------------------------------------------------------------------------------------------------------

PAGE = """# What fits on one GPU

Written by `python -m benchmarks.shapes --out docs/shapes.md`, on a machine without a GPU. Each stage's own code ran
on tensors without memory, at the sizes that `conf/model/*.yaml` state, unpruned: two and three blocks were traced,
and every further one counts as the third. Passes: 16 texts of 1,024 tokens for scores (4 for `perplexity` and `SDM`)
and repair, 4,096 tokens of rows of 256 for fine-tuning, 32 prompts of 210 tokens and 128 new ones for rewrites, 32
requests of 1,170 tokens for likelihoods.

No tensor was on the wrong device, and no frozen 16-bit weight was held in float32; SDM widens one MLP matrix at a
time. "by formula" is how far the estimate of a dry run (`sdd/planning/estimates.py`) is from the trace: of memory,
and of matrix products. A GPU of N GB counts as N * 1e9 bytes; what a GiB has more is left to the CUDA context and to
fragments. A merge is made on the CPU, one matrix of an MLP at a time. Cuts and exports of depth and width copy bytes,
and make no tensor.

The operations of LoRA count as 1.5 passes back in estimates, a guess of its time; traced are little more than 1.

What only a GPU shows is not measured: kernels and their workspaces, bandwidth, seconds, whether results are right in
bfloat16. Autocast was told by rule, not by torch's own; attention is the kernel that a CUDA build would choose. 4-bit
bases were not traced. What does not fit takes less with `trainer.gradient_checkpointing=true`, a smaller
`trainer.micro_batch_tokens`, or `adapter=qlora`; scores and answers with a smaller `trainer.inference_batch_size` or
`evaluation.batch_size`. Each of these three, and `engine.batch_size`, may be `auto`: the largest power of two that the
estimates let into 80% of what is free. What does not fit after all is passed in halves, which a line in the log tells.
"""

Record = dict[str, Any]
"""Bytes at the peak by kind, bytes on the host, FLOPs, what the formulas say, weights widened, bytes computed with on
the CPU."""


def record(stage: str, case: Case) -> Record:
    trace, estimate = traced(stage, case)
    return {
        "peak": trace.peak,
        "host": trace.host_peak,
        "flops": trace.flops,
        "memory": estimate.memory,
        "operations": estimate.seconds,
        "widened": dict(trace.widened),
        "on_cpu": dict(trace.on_cpu),
    }


def extended(two: Record, three: Record, blocks: int) -> Record:
    """Of so many blocks: every further one takes what the third does."""

    def at(first: float, second: float) -> float:
        return first + (blocks - 2) * (second - first)

    kinds = two["peak"].keys() | three["peak"].keys()
    peak = {kind: at(two["peak"].get(kind, 0), three["peak"].get(kind, 0)) for kind in kinds}
    numbers = {key: at(two[key], three[key]) for key in ("host", "flops", "memory", "operations")}
    return {"peak": peak, **numbers, "widened": three["widened"], "on_cpu": three["on_cpu"]}


def table(records: dict[str, Record]) -> list[str]:
    """A line a model and stage; bytes are those of the GPU, but for a merge, which has none."""
    lines = ["| model | stage | traced, GB | of which | by formula | TFLOP | by formula | fits in |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        for stage in STAGES:
            pair = [records.get(f"{name}|{stage}|{blocks}") for blocks in (2, 3)]
            if None in pair:
                continue
            one = extended(*pair, Case(name).cost_model.blocks)  # type: ignore[arg-type]
            on_host = stage.startswith("merged")
            traced_bytes = one["host"] if on_host else sum(one["peak"].values())
            by_kind = sorted(one["peak"].items(), key=lambda pair: -pair[1])
            parts = "" if on_host else ", ".join(f"{kind} {size / 1e9:.1f}" for kind, size in by_kind if size > 5e7)
            sizes = [str(size) for size in GPUS if traced_bytes <= size * 1e9]
            fits = "no GPU needed" if on_host else ", ".join(sizes) or "none"
            apart, more = one["memory"] / traced_bytes - 1, one["operations"] / max(one["flops"], 1) - 1
            known = one["flops"] and stage != "scores, perplexity"  # they grow with the square of the blocks
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
    lines = table(records)
    print("\n".join(lines))
    if given.out:
        given.out.write_text("\n".join([PAGE, *lines]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
