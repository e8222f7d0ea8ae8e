"""Fine-tuning with LoRA: the project's training side by side with padded and with packed batches of Hugging Face's.

    python benchmarks/finetuning.py [--pairs 5] [--quick] [--cases embedded ...] [--trl PYTHON] > finetuning.json

The same rows, global batches, adapter, optimiser and schedule. `padded` is `transformers.Trainer` on batches in the
order of the plan, padded to their longest row, with logits at every token. `packed` is what packing takes at least: a
plain loop over rows laid end to end in blocks of 256 or 512 tokens (best fit decreasing), their positions counted anew
and attention kept within a row by transformers' own mask, logits at every token. Both keep transformers' default
attention (SDPA), the project that of `trainer=cpu` (eager). Every pair runs all ways one after the other in this
process, in the other order in every other pair. Seconds are the processor's on one thread, the median of the pairs'
ratios counts, and a ratio is given only where the losses of all steps are the same to 1e-5 of their size.

`trl` is TRL's own packing, in a process of an environment that has it (`pip install trl peft`, and torch for CPUs), see
`trl_packing.py`: the rows of one step in every step, whose seconds are those of its training loop alone.

`embedded` is the embedded model on `tiny_instruct`, `synthetic` a random Llama of 12 blocks, 512 wide, with 32,000
tokens, on random rows as long as those of GSM8K. `... last` trains the last four blocks alone, for three epochs, where
states below are computed once. What is left is told by `limit`: bare passes forward and back over as many tokens in
rows of one length, with no padding, optimiser or loop, logits at the targets.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import random_llama
from benchmarks.rows import Ratio, paired, ratio

TEACHER = Path(__file__).resolve().parents[1] / "sdd" / "tiny" / "teacher"
Losses = list[float]
"""A mean over target tokens for every step."""
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": ["all-linear"]}
LAST = {"scope": "last", "blocks": 4}
OPTIMISATION = {"learning_rate": 1e-4, "weight_decay": 0.0, "warmup_share": 0.05, "clip_norm": 1.0}
SEED = 0
TRL = 1.3
"""How many times as fast training is expected to be as TRL on packed rows."""
CLOSE = 1e-5
"""How far the losses of a step may be apart, of their size."""


@dataclass(frozen=True)
class Case:
    """A model, rows, rows a step, epochs, the length that rows are packed to, the adapter, and how many times as fast
    training is expected to be as each other way."""

    model: str
    rows: int
    batch: int
    epochs: int
    block: int
    adapter: dict[str, Any]
    goals: dict[str, float]


CASES = {
    "embedded": Case("embedded", 256, 32, 1, 256, LORA, {"padded": 2.0, "packed": 1.3}),
    "embedded last": Case("embedded", 128, 32, 3, 256, LORA | LAST, {"padded": 2.5}),
    "synthetic": Case("synthetic", 16, 8, 1, 512, LORA, {"padded": 2.0, "packed": 1.3}),
    "synthetic last": Case("synthetic", 8, 8, 3, 512, LORA | LAST, {"padded": 2.5}),
}


def embedded(rows: int) -> tuple[Any, list[Any]]:
    """(model, training rows of at most 256 tokens) of the embedded teacher."""
    from sdd.data.tiny import TinyTasks
    from sdd.models.checkpoints import Checkpoint
    from sdd.stages.tuned import tokenized

    checkpoint = Checkpoint(TEACHER)
    examples = [{"prompt": one.prompt, "target": one.reference} for one in TinyTasks(num_rows=rows).examples()]
    return checkpoint.model("float32"), tokenized(checkpoint.tokenizer(), examples, None, 256)[0]


def synthetic(rows: int) -> tuple[Any, list[Any]]:
    """The same of a random Llama; prompts have 55 tokens in the median and answers 115, spread as in GSM8K."""
    from sdd.finetuning.module import TrainingRow

    model = random_llama()
    model.generation_config.pad_token_id = 0
    rng, drawn = random.Random(SEED), []
    for _ in range(rows):
        prompt, answer = (round(median * rng.lognormvariate(0, 0.42)) for median in (55, 115))
        drawn.append(TrainingRow([rng.randrange(1, 32_000) for _ in range(prompt + answer)], prompt))
    return model, drawn


MODELS: dict[str, Callable[[int], tuple[Any, list[Any]]]] = {"embedded": embedded, "synthetic": synthetic}


class Bench:
    """A student with its adapter, as it was before every way; the rows of every step."""

    def __init__(self, case: Case) -> None:
        import torch

        from sdd.finetuning.adapters import adapted
        from sdd.stages.tuned import _places

        self.case = case
        model, self.rows = MODELS[case.model](case.rows)
        torch.manual_seed(SEED)
        self.student = adapted(model, case.adapter, _places(case.adapter, model, None))
        self.initial = {name: tensor.clone() for name, tensor in self.trained().items()}
        self.block = max(case.block, *(len(row.ids) for row in self.rows))

    @property
    def plan(self) -> list[list[int]]:
        from sdd.finetuning.module import step_rows

        return step_rows(len(self.rows), self.case.batch, self.case.epochs, SEED)

    def first(self, rows: int) -> "Bench":
        """The same with the first rows alone."""
        bench = copy(self)
        bench.rows = self.rows[:rows]
        return bench

    def trained(self) -> dict[str, Any]:
        return {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}

    def reset(self, attention: str) -> None:
        for name, parameter in self.trained().items():
            parameter.data.copy_(self.initial[name])
            parameter.grad = None
        self.student.get_base_model().set_attn_implementation(attention)
        self.student.train()

    def optimisers(self) -> tuple[Any, Any]:
        """The project's own optimiser and schedule."""
        from sdd.finetuning.module import Optimisation, StudentModule

        steps = len(self.plan)
        optimisation = Optimisation(**OPTIMISATION, seed=SEED, steps=steps, steps_per_epoch=steps)
        made = StudentModule(self.student, self.rows, self.plan, [], optimisation, 1).configure_optimizers()
        return made["optimizer"], made["lr_scheduler"]["scheduler"]


def own(bench: Bench) -> Losses:
    """As the stage `tuned` trains."""
    from sdd.finetuning.module import loss_sum
    from sdd.stages.runtime import Runtime
    from sdd.stages.tuned import _fit
    from sdd.store import Recipe

    bench.reset("eager")
    spec = {"adapter": bench.case.adapter, "base_quantisation": None, "precision": "32", "system_prompt": None}
    finetune = OPTIMISATION | {"batch_size": bench.case.batch, "epochs": bench.case.epochs}
    finetune |= {"max_length": bench.block}
    spec |= {"finetune": finetune, "seed": SEED}
    recipe = Recipe("tuned", 1, spec, {"targets": Recipe("targets", 1, {"mode": "sft"})})
    with tempfile.TemporaryDirectory() as scratch:
        history, _ = _fit(bench.student, None, loss_sum, bench.rows, [], recipe, Runtime(), Path(scratch))
    return [row["loss"] for row in history]


def padded(bench: Bench) -> Losses:
    """By `transformers.Trainer`."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    bench.reset("sdpa")
    losses: Losses = []

    def collated(rows: list[Any]) -> dict[str, Any]:
        ids, labels, mask = (
            torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
            for tensors, value in (
                ([torch.tensor(row.ids) for row in rows], 0),
                ([torch.tensor(labels_of(row)) for row in rows], -100),
                ([torch.ones(len(row.ids), dtype=torch.long) for row in rows], 0),
            )
        )
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class Noting(Trainer):
        def compute_loss(self, *words: Any, **named: Any) -> Any:
            loss = super().compute_loss(*words, **named)
            losses.append(float(loss.detach()))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=bench.case.batch,
            num_train_epochs=1,
            max_grad_norm=OPTIMISATION["clip_norm"],
            train_sampling_strategy="sequential",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
        )
        shown = [bench.rows[index] for step in bench.plan for index in step]
        trainer = Noting(
            bench.student, arguments, train_dataset=shown, data_collator=collated, optimizers=bench.optimisers()
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return losses


def labels_of(row: Any) -> list[int]:
    return [-100] * row.prompt_length + row.ids[row.prompt_length :]


def packed_blocks(rows: Sequence[Any], size: int) -> list[list[Any]]:
    """The rows in blocks of at most `size` tokens, as few as best fit decreasing finds."""
    blocks: list[list[Any]] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        room = [size - sum(len(one.ids) for one in block) - len(row.ids) for block in blocks]
        best = min((left, at) for at, left in enumerate([*room, size - len(row.ids)]) if left >= 0)[1]
        if best == len(blocks):
            blocks.append([])
        blocks[best].append(row)
    return blocks


def packed(bench: Bench) -> Losses:
    """A plain loop, a pass a block."""
    import torch

    bench.reset("sdpa")
    optimizer, scheduler = bench.optimisers()
    losses: Losses = []
    for step in bench.plan:
        rows = [bench.rows[index] for index in step]
        tokens, total = sum(len(row.ids) - row.prompt_length for row in rows), 0.0
        for block in packed_blocks(rows, bench.block):
            ids = torch.tensor([[token for row in block for token in row.ids]])
            positions = torch.tensor([[at for row in block for at in range(len(row.ids))]])
            labels = torch.tensor([[label for row in block for label in labels_of(row)]])
            loss = bench.student(
                input_ids=ids, position_ids=positions, labels=labels, num_items_in_batch=tokens, use_cache=False
            ).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(bench.trained().values(), OPTIMISATION["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        losses.append(total)
    return losses


WAYS: dict[str, Callable[[Bench], Losses]] = {"sdd": own, "padded": padded, "packed": packed}


def limit(bench: Bench) -> None:
    """Bare passes over as many tokens, 512 at a time in rows of the mean length; frozen blocks once in later epochs."""
    import torch

    from sdd.finetuning.prefix import frozen_states
    from sdd.forward.losses import target_loss_sum
    from sdd.models.checkpoints import decoder, head_logits

    bench.reset("eager")
    model = bench.student.get_base_model()
    length = round(statistics.mean(len(row.ids) for row in bench.rows))
    targets = round(statistics.mean(len(row.ids) - row.prompt_length for row in bench.rows))
    rows, together = [[1] * length for _ in bench.rows], max(1, 512 // length)
    with tempfile.TemporaryDirectory() as folder:
        lengths = [length] * len(rows)
        frozen = frozen_states(model, lengths, rows.__getitem__, Path(folder), 512) if bench.case.epochs > 1 else None
        for _ in range(bench.case.epochs):
            for at in range(0, len(rows), together):
                shown = rows[at : at + together]
                with frozen.standing_in(range(at, at + len(shown)), "cpu") if frozen else nullcontext():
                    states = decoder(model)(input_ids=torch.tensor(shown), use_cache=False).last_hidden_state
                logits = head_logits(model, states[:, -targets:].flatten(0, 1))
                target_loss_sum(logits, torch.zeros(len(logits), dtype=torch.long)).backward()


class PackedByTRL:
    """A process that trains what `bench` has with TRL, whenever it is asked."""

    def __init__(self, python: Path, bench: Bench, folder: Path) -> None:
        optimizer, scheduler = bench.optimisers()
        settings, (factor,) = optimizer.defaults, scheduler.lr_lambdas
        case = {
            "rows": [{"input_ids": row.ids, "labels": labels_of(row)} for row in bench.rows],
            "block": bench.block,
            "rates": [factor(step) * settings["lr"] for step in range(len(bench.plan))],
            "clip_norm": OPTIMISATION["clip_norm"],
            "adamw": {name: settings[name] for name in ("betas", "eps", "weight_decay")},
        }
        (folder / "case.json").write_text(json.dumps(case))
        MODELS[bench.case.model](1)[0].save_pretrained(folder / "model")
        shutil.copy(TEACHER / "tokenizer.json", folder / "model")  # for its padding token alone
        shutil.copy(TEACHER / "tokenizer_config.json", folder / "model")
        bench.reset("sdpa")
        bench.student.save_pretrained(folder / "adapter", save_embedding_layers=False)
        command = [str(python), str(Path(__file__).with_name("trl_packing.py")), str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def trained(self) -> tuple[float, Losses]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended")  # type: ignore[arg-type]
        answer = json.loads(line)
        return answer["seconds"], answer["losses"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def timed(way: Callable[[Bench], Any], bench: Bench) -> tuple[float, Any]:
    started = time.process_time()
    result = way(bench)
    return time.process_time() - started, result


def padding(bench: Bench) -> dict[str, float]:
    """Tokens that each way passes, a real one counting 1, and the share of target tokens."""
    from sdd.finetuning.module import micro_batches, target_tokens
    from sdd.stages.runtime import Runtime

    real = sum(len(bench.rows[index].ids) for step in bench.plan for index in step)
    passed = dict.fromkeys(WAYS, 0)
    for step in bench.plan:
        rows = [bench.rows[index] for index in step]
        passed["padded"] += len(rows) * max(len(row.ids) for row in rows)
        passed["packed"] += sum(len(row.ids) for row in rows)
        lengths = [len(row.ids) for row in rows]
        passed["sdd"] += sum(
            len(micro) * lengths[micro[-1]] for micro in micro_batches(lengths, Runtime().micro_batch_tokens)
        )
    shares = {way: tokens / real for way, tokens in passed.items()}
    return shares | {"targets": target_tokens(bench.rows) / sum(len(row.ids) for row in bench.rows)}


def compare(name: str, pairs: int) -> list[dict[str, Any]]:
    """Seconds of every pair by way, and a result for every way that is compared with."""
    case = CASES[name]
    bench = Bench(case)
    ways = ["sdd", *case.goals]
    for way in ways:  # what is imported and set up once
        WAYS[way](bench.first(2))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, Losses] = {}
    for number in range(pairs):
        for way in ways if number % 2 else reversed(ways):
            taken, losses[way] = timed(WAYS[way], bench)
            seconds[way].append(taken)
    least = statistics.median(timed(limit, bench)[0] for _ in range(3))
    return [result(name, bench, way, goal, seconds, losses, least) for way, goal in case.goals.items()]


def compare_with_trl(name: str, pairs: int, python: Path) -> dict[str, Any]:
    """The same with TRL: the rows of the first step, in as many steps as the case has."""
    whole = Bench(CASES[name])
    bench = whole.first(whole.case.batch)
    bench.case = replace(whole.case, epochs=len(whole.plan))
    with tempfile.TemporaryDirectory() as folder:
        peer = PackedByTRL(python, bench, Path(folder))
        try:
            ways = {"sdd": lambda: timed(own, bench), "trl": peer.trained}
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            losses: dict[str, Losses] = {}
            for number in range(-1, pairs):  # the first pair is not counted
                for way in ways if number % 2 else reversed(ways):
                    taken, losses[way] = ways[way]()
                    seconds[way] += [taken] * (number >= 0)
        finally:
            peer.end()
    least = statistics.median(timed(limit, bench)[0] for _ in range(3))
    return result(name, bench, "trl", TRL, seconds, losses, least)


def result(
    name: str,
    bench: Bench,
    way: str,
    goal: float,
    seconds: dict[str, list[float]],
    losses: dict[str, Losses],
    limit: float,
) -> dict[str, Any]:
    """What came of the pairs with another way."""
    apart = max(abs(a - b) / a for a, b in zip(losses["sdd"], losses[way], strict=True))
    ratios = [other / mine for other, mine in zip(seconds[way], seconds["sdd"], strict=True)]
    spread = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return {
        "name": name,
        "against": way,
        "goal": goal,
        "ratio": spread if apart <= CLOSE else None,
        "reached": apart <= CLOSE and spread["median"] >= goal,
        "seconds": {"other": seconds[way], "sdd": seconds["sdd"], "limit": limit},
        "losses_apart": apart,
        "steps": len(bench.plan),
        "tokens_passed": padding(bench),
    }


def run(
    few: bool = False, pairs: int = 5, names: Sequence[str] = tuple(CASES), trl: Path | None = None
) -> list[dict[str, Any]]:
    """A result for every case and way that it is compared with; `few` takes the embedded model alone, in one pair.

    `trl` is the python of an environment with TRL, for the cases in which packing counts.
    """
    import torch

    torch.set_num_threads(1)
    chosen = [name for name in names if not few or CASES[name].model == "embedded"]
    pairs = 1 if few else pairs
    packing = [name for name in chosen if trl is not None and "packed" in CASES[name].goals]
    found = [result for name in chosen for result in compare(name, pairs)]
    return found + [compare_with_trl(name, pairs, trl) for name in packing if trl is not None]


def rows(trl: Path | None = None, pairs: int = 5) -> list[Ratio]:
    """For the table of all benchmarks."""
    found = []
    for result in run(pairs=pairs, trl=trl):
        seconds = result["seconds"]
        runs = list(zip(seconds["other"], seconds["sdd"], strict=True))
        parity = f"losses {result['losses_apart']:.0e} apart" if result["ratio"] else ""
        most = statistics.median(seconds["other"]) / seconds["limit"]
        peer = {"padded": "a padded Trainer", "packed": "a packed loop", "trl": "TRL, packed"}[result["against"]]
        found.append(ratio(f"fine-tuning, {result['name']}", peer, runs, parity, goal=result["goal"], limit=most))
    return found


def quick() -> float:
    """Seconds of bare passes forth and back over those of training."""
    bench = Bench(CASES["embedded"]).first(64)
    own(bench.first(2))
    runs, _, _ = paired(lambda: limit(bench), lambda: own(bench), 3, time.process_time)
    return ratio("", "", runs, "").ratio


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the ratios."""
    lines = [
        "| case | against | s | sdd, s | limit, s | times as fast (range) | goal | losses apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        seconds, faster = result["seconds"], result["ratio"]
        other, mine = (statistics.median(seconds[way]) for way in ("other", "sdd"))
        spread = (
            f"**{faster['median']:.2f}** ({faster['lowest']:.2f} to {faster['highest']:.2f})" if faster else "differ"
        )
        taken = f"{other:.2f} | {mine:.2f} | {seconds['limit']:.2f}"
        apart = f"{result['goal']} | {result['losses_apart']:.1e}"
        lines.append(f"| {result['name']} | {result['against']} | {taken} | {spread} | {apart} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="the embedded model alone, one pair")
    parser.add_argument("--trl", type=Path, help="the python of an environment with TRL 1.16")
    given = parser.parse_args(arguments)
    results = run(given.quick, given.pairs, given.cases, given.trl)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({**machine, "threads": 1, "results": results}, indent=1))
    print(table(results), file=sys.stderr)
    return 0 if all(result["reached"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
