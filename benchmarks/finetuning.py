"""Fine-tuning with LoRA: the project's training side by side with padded and with packed batches of Hugging Face's.

    python -m benchmarks finetuning [--trl PYTHON]

The same rows, global batches, adapter, optimiser and schedule. `padded` is `transformers.Trainer` on batches in the
order of the plan, padded to their longest row, with logits at every token. `packed` is what packing takes at least: a
plain loop over rows laid end to end in blocks of 256 or 512 tokens (best fit decreasing), their positions counted anew
and attention kept within a row by transformers' own mask, logits at every token. All have the same attention (SDPA).
Seconds are the processor's on one thread, or a GPU's, and a ratio is given only where the losses of all steps are the
same to 1e-5 of their size.

`trl` is TRL's own packing, in a process of an environment that has it (`pip install trl peft`, and torch), see
`trl_packing.py`: the rows of one step in every step, whose seconds are those of its training loop alone.

`embedded` is the embedded model on `tiny_instruct`, `synthetic` a random Llama of 12 blocks, 512 wide, with 32,000
tokens, on random rows as long as those of GSM8K. `... last` trains the last four blocks alone, for three epochs, where
states below are computed once. `stories` is a writer of stories on stories, if one is given. What is left is told by
the limit: bare passes forward and back over as many tokens in rows of one length, with no padding, optimiser or loop,
logits at the targets.
"""

import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.models import TEACHER, random_llama, writer_of_stories
from benchmarks.rows import Ratio, Setting
from benchmarks.timing import Seconds, clocked, in_turns, share

Losses = list[float]
"""A mean over target tokens for every step."""
LORA = {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": ["all-linear"]}
LAST = {"scope": "last", "blocks": 4}
OPTIMISATION = {"learning_rate": 1e-4, "weight_decay": 0.0, "warmup_share": 0.05, "clip_norm": 1.0}
SEED = 0
TRL = 1.3
"""How many times as fast training is expected to be as TRL on packed rows."""
PEERS = {"padded": "a padded Trainer", "packed": "a packed loop", "trl": "TRL, packed"}
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
    "stories": Case("stories", 64, 16, 1, 512, LORA, {"padded": 2.0, "packed": 1.3}),
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


def stories(given: tuple[Path, Path], rows: int) -> tuple[Any, list[Any]]:
    """The same of a writer of stories; what follows the first 32 tokens is learnt."""
    from sdd.finetuning.module import TrainingRow

    model, texts = writer_of_stories(given, rows, 512)
    model.generation_config.pad_token_id = 0
    return model, [TrainingRow(text, 32) for text in texts]


MODELS: dict[str, Callable[[int], tuple[Any, list[Any]]]] = {"embedded": embedded, "synthetic": synthetic}


def models(setting: Setting) -> dict[str, Callable[[int], tuple[Any, list[Any]]]]:
    """And a writer of stories, if one is given."""
    return MODELS | ({"stories": partial(stories, setting.stories)} if setting.stories else {})


class Bench:
    """A student with its adapter, as it was before every way; the rows of every step."""

    def __init__(self, case: Case, setting: Setting) -> None:
        import torch

        from sdd.finetuning.adapters import adapted
        from sdd.stages.tuned import _places

        self.case, self.setting = case, setting
        model, self.rows = models(setting)[case.model](case.rows)
        torch.manual_seed(SEED)
        self.student = adapted(model, case.adapter, _places(case.adapter, model, None)).to(setting.device)
        self.initial = {name: tensor.clone() for name, tensor in self.trained().items()}
        self.block = max(case.block, *(len(row.ids) for row in self.rows))

    @property
    def plan(self) -> list[list[int]]:
        from sdd.finetuning.module import step_rows

        return step_rows(len(self.rows), self.case.batch, self.case.epochs, SEED)

    @property
    def runtime(self) -> Any:
        """That of `trainer=cpu` or `trainer=gpu`."""
        from sdd.stages.runtime import Runtime

        if self.setting.device == "cpu":
            return Runtime()
        return Runtime(accelerator="gpu", micro_batch_tokens=4096)

    def first(self, rows: int) -> "Bench":
        """The same with the first rows alone."""
        bench = copy(self)
        bench.rows = self.rows[:rows]
        return bench

    def trained(self) -> dict[str, Any]:
        return {name: parameter for name, parameter in self.student.named_parameters() if parameter.requires_grad}

    def reset(self) -> None:
        for name, parameter in self.trained().items():
            parameter.data.copy_(self.initial[name])
            parameter.grad = None
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
    from sdd.stages.tuned import _fit
    from sdd.store import Recipe

    bench.reset()
    spec = {"adapter": bench.case.adapter, "base_quantisation": None, "precision": "32", "system_prompt": None}
    finetune = OPTIMISATION | {"batch_size": bench.case.batch, "epochs": bench.case.epochs}
    finetune |= {"max_length": bench.block}
    spec |= {"finetune": finetune, "seed": SEED}
    recipe = Recipe("tuned", 1, spec, {"targets": Recipe("targets", 1, {"mode": "sft"})})
    with tempfile.TemporaryDirectory() as scratch:
        history, _ = _fit(bench.student, None, loss_sum, bench.rows, [], recipe, bench.runtime, Path(scratch))
    return [row["loss"] for row in history]


def padded(bench: Bench) -> Losses:
    """By `transformers.Trainer`."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainingArguments

    bench.reset()
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
            use_cpu=bench.setting.device == "cpu",
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

    bench.reset()
    optimizer, scheduler = bench.optimisers()
    losses: Losses = []
    for step in bench.plan:
        rows = [bench.rows[index] for index in step]
        tokens, total = sum(len(row.ids) - row.prompt_length for row in rows), 0.0
        for block in packed_blocks(rows, bench.block):
            ids, positions, labels = (
                torch.tensor([[number for row in block for number in of(row)]], device=bench.setting.device)
                for of in (lambda row: row.ids, lambda row: range(len(row.ids)), labels_of)
            )
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

    bench.reset()
    model, device = bench.student.get_base_model(), bench.setting.device
    length = round(statistics.mean(len(row.ids) for row in bench.rows))
    targets = round(statistics.mean(len(row.ids) - row.prompt_length for row in bench.rows))
    rows, together = [[1] * length for _ in bench.rows], max(1, 512 // length)
    with tempfile.TemporaryDirectory() as folder:
        lengths = [length] * len(rows)
        kept = partial(frozen_states, model, lengths, rows.__getitem__, Path(folder), 512, device)
        frozen = kept() if bench.case.epochs > 1 else None
        for _ in range(bench.case.epochs):
            for at in range(0, len(rows), together):
                shown = rows[at : at + together]
                with frozen.standing_in(range(at, at + len(shown)), device) if frozen else nullcontext():
                    ids = torch.tensor(shown, device=device)
                    states = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
                logits = head_logits(model, states[:, -targets:].flatten(0, 1))
                target_loss_sum(logits, torch.zeros(len(logits), dtype=torch.long, device=device)).backward()


class PackedByTRL:
    """A process that trains what `bench` has with TRL, whenever it is asked."""

    def __init__(self, python: Path, bench: Bench, folder: Path) -> None:
        optimizer, scheduler = bench.optimisers()
        settings, (factor,) = optimizer.defaults, scheduler.lr_lambdas
        case = {
            "rows": [{"input_ids": row.ids, "labels": labels_of(row)} for row in bench.rows],
            "block": bench.block,
            "device": bench.setting.device,
            "rates": [factor(step) * settings["lr"] for step in range(len(bench.plan))],
            "clip_norm": OPTIMISATION["clip_norm"],
            "adamw": {name: settings[name] for name in ("betas", "eps", "weight_decay")},
        }
        (folder / "case.json").write_text(json.dumps(case))
        models(bench.setting)[bench.case.model](1)[0].save_pretrained(folder / "model")
        shutil.copy(TEACHER / "tokenizer.json", folder / "model")  # for its padding token alone
        shutil.copy(TEACHER / "tokenizer_config.json", folder / "model")
        bench.reset()
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


def padding(bench: Bench) -> dict[str, float]:
    """Tokens that each way passes, a real one counting 1, and the share of target tokens."""
    from sdd.finetuning.module import micro_batches, target_tokens

    real = sum(len(bench.rows[index].ids) for step in bench.plan for index in step)
    passed = dict.fromkeys(WAYS, 0)
    for step in bench.plan:
        rows = [bench.rows[index] for index in step]
        passed["padded"] += len(rows) * max(len(row.ids) for row in rows)
        passed["packed"] += sum(len(row.ids) for row in rows)
        lengths = [len(row.ids) for row in rows]
        passed["sdd"] += sum(
            len(micro) * lengths[micro[-1]] for micro in micro_batches(lengths, bench.runtime.micro_batch_tokens)
        )
    shares = {way: tokens / real for way, tokens in passed.items()}
    return shares | {"targets": target_tokens(bench.rows) / sum(len(row.ids) for row in bench.rows)}


def compared(name: str, setting: Setting) -> list[Ratio]:
    """A row for every way that the case is compared with."""
    bench = Bench(CASES[name], setting)
    ways = [*bench.case.goals, "sdd"]
    for way in ways:  # what is imported and set up once
        WAYS[way](bench.first(2))
    each = {way: partial(WAYS[way], bench) for way in ways} | {"limit": partial(limit, bench)}
    taken, losses = in_turns(clocked(each, setting.device), setting.turns)
    return [row(name, bench, way, goal, taken, losses) for way, goal in bench.case.goals.items()]


def compared_with_trl(name: str, setting: Setting, python: Path) -> Ratio:
    """The same with TRL: the rows of the first step, in as many steps as the case has."""
    whole = Bench(CASES[name], setting)
    bench = whole.first(whole.case.batch)
    bench.case = replace(whole.case, epochs=len(whole.plan))
    with tempfile.TemporaryDirectory() as folder:
        peer = PackedByTRL(python, bench, Path(folder))
        try:
            ways = {"trl": peer.trained}
            ways |= clocked({"sdd": partial(own, bench), "limit": partial(limit, bench)}, setting.device)
            in_turns(ways, 1)  # what is imported and set up once
            taken, losses = in_turns(ways, setting.turns)
        finally:
            peer.end()
    return row(name, bench, "trl", TRL, taken, losses)


def row(name: str, bench: Bench, way: str, goal: float, taken: Seconds, losses: dict[str, list[Losses]]) -> Ratio:
    """What came of the turns with another way."""
    apart = max(
        abs(a - b) / a
        for ours, theirs in zip(losses["sdd"], losses[way], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )
    parity = f"losses {apart:.0e} apart" if apart <= CLOSE else ""
    details = {"losses_apart": apart, "steps": len(bench.plan), "tokens_passed": padding(bench)}
    what, peer = f"fine-tuning, {name}", PEERS[way]
    return Ratio(what, peer, taken[way], taken["sdd"], taken["limit"], parity, goal, details)


def rows(setting: Setting) -> list[Ratio]:
    cases = [name for name, case in CASES.items() if case.model in models(setting)]
    found = [row for name in cases for row in compared(name, setting)]
    if setting.trl is None:
        print("finetuning: TRL is left out, it needs --trl", file=sys.stderr)
        return found
    packing = [name for name in cases if "packed" in CASES[name].goals]
    return found + [compared_with_trl(name, setting, setting.trl) for name in packing]


def quick() -> float:
    """Seconds of bare passes forth and back over those of training."""
    bench = Bench(CASES["embedded"], Setting()).first(64)
    own(bench.first(2))
    return share(partial(limit, bench), partial(own, bench))
