"""Stage `targets`: the answers that a student is trained on, each with where it came from and why."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sdd.analysis import shift
from sdd.errors import UserError
from sdd.finetuning.losses import needed
from sdd.finetuning.modes import MODES, REQUESTS
from sdd.models import checkpoints
from sdd.models.chats import training_ids
from sdd.planning import estimates
from sdd.planning.estimates import Estimate
from sdd.rewriting.selection import Selection, answer_correct, choose_target, chosen, eligible, shortest, with_noise
from sdd.stages import rewrites
from sdd.stages.datasets import read_examples, selection_for
from sdd.stages.rewrites import Rewrites
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.store import Recipe
from sdd.store.files import read_jsonl, write_json, write_jsonl
from sdd.study import Study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets(Spec):
    """`dataset` where answers of the dataset are the targets; where rewrites are, how they are chosen, which of several
    by `choice`, and whether refused ones are kept beside the targets."""

    mode: str
    dataset: dict[str, Any] | None = None
    rule: Any = None
    leak_phrases: Any = None
    select: bool | None = None
    gold_share: float | None = None
    noise_share: float = 0.0
    rejected: bool = False
    choice: str = "first"


def recipe(study: Study) -> Recipe:
    """The version rises by 1 where final answers are compared that were once read otherwise."""
    finetune, rows = study.config.finetune, study.rows
    if finetune.mode == "none":
        raise UserError("finetune=none has no targets; choose finetune=sft or finetune=self_distill")
    mode = MODES[finetune.mode]
    if mode.targets == "gold" and not rows.source.has_gold:
        raise UserError("finetune=gold needs answers in the teacher's own register; this dataset has none")
    if mode.targets != "rewrites":
        return study.recipe("targets", Targets(mode.name, dataset=rows.spec), {}, rows.labels)
    shares = {"gold_share": finetune.gold_share, "noise_share": finetune.noise_share}
    rejected = "rejected rows" in needed(study.losses)
    selection, choice = rewrites.selection_of(study), finetune.choice
    spec = Targets(mode.name, **selection, select=finetune.select, **shares, rejected=rejected, choice=choice)
    by_answer = finetune.select or finetune.noise_share or choice == "answer_correct"
    raised = REQUESTS[finetune.request] is None and rows.judged_anew and bool(by_answer)
    return study.recipe("targets", spec, {"rewrites": rewrites.recipe(study)}, rows.labels, raised)


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    return estimates.targets(sizes.rows, sizes.prompt + 2 * sizes.answer)


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`train.jsonl` with a reason for every row, and `summary.json` with the count of each."""
    spec = Targets.read(recipe.spec)
    dataset = recipe.inputs["rewrites"].spec["dataset"] if "rewrites" in inputs else spec.dataset
    assert dataset is not None, "targets are made of rewrites or of a dataset"
    examples, reasons = read_examples(runtime, dataset), Counter[str]()
    groups = Counter(e.group for e in examples if e.group is not None)
    rows: Iterable[dict[str, Any]]
    if "rewrites" in inputs:
        del examples
        rows = _chosen(runtime, spec, Rewrites.read(recipe.inputs["rewrites"].spec), inputs["rewrites"])
    else:
        is_gold = MODES[spec.mode].targets == "gold"
        rows = (
            {
                "id": e.id,
                **e.turns,
                "prompt": e.prompt,
                "reference": e.reference,
                "target": e.gold if is_gold else e.reference,
                "source": "gold" if is_gold else "reference",
                "reason": spec.mode,
            }
            for e in examples
        )

    def counted() -> Iterator[dict[str, Any]]:
        for row in rows:
            reasons[row["reason"]] += 1
            yield row

    write_jsonl(folder / "train.jsonl", counted())
    if "rewrites" in inputs:
        log.info("targets: %s", ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()))
    facts = {"rows": reasons.total(), "reasons": dict(reasons), "groups": dict(groups)}
    write_json(folder / "summary.json", facts)


def _chosen(runtime: Runtime, spec: Targets, asked: Rewrites, rewrites: Path) -> Iterable[dict[str, Any]]:
    """Of every row the rewrite, or the reference where that is not good enough; noise needs all of them at once."""

    def selection(row: dict[str, Any]) -> Selection:
        return selection_for(spec.rule, spec.leak_phrases, row["id"])

    def judged(row: dict[str, Any]) -> Selection | None:
        return selection(row) if spec.select else None

    def choice(row: dict[str, Any]) -> Callable[[list[str]], str]:
        if spec.choice == "most_likely":
            return lambda texts: max(texts, key=lambda text: likely.get((row["id"], text), 0.0))
        return shortest if spec.choice == "shortest" else answer_correct(selection(row), row["reference"])

    def written() -> Iterator[dict[str, Any]]:
        for row in read_jsonl(rewrites / "rewrites.jsonl"):
            yield row if spec.choice == "first" else chosen(row, judged(row), choice(row))

    likely: dict[tuple[str, str], float] = {}
    if spec.choice == "most_likely":
        several = ((row, eligible(row, judged(row))) for row in read_jsonl(rewrites / "rewrites.jsonl"))
        likely = _likelihoods(runtime, asked, several)
    rows = (choose_target(row, judged(row), spec.gold_share or 0.0, keep_rejected=spec.rejected) for row in written())
    return with_noise(list(rows), spec.noise_share, selection) if spec.noise_share else rows


def _likelihoods(
    runtime: Runtime, asked: Rewrites, rows: Iterable[tuple[dict[str, Any], list[str]]]
) -> dict[tuple[str, str], float]:
    """By row and rewrite, the mean log-probability of its tokens to the teacher, who is shown the bare task.

    Of rows with several rewrites to choose among; of others there is nothing to know.
    """
    checkpoint = runtime.checkpoint(asked.teacher, "teacher")
    tokenizer = checkpoint.tokenizer()
    names, shown = [], []
    for row, texts in rows:
        for text in texts if len(texts) > 1 else ():
            ids, first = training_ids(tokenizer, row["prompt"], text, asked.system_prompt, row.get("before", ()))
            names.append((row["id"], text))
            shown.append((ids[:first], ids[first:]))
    if not shown:
        return {}
    model = checkpoint.model(asked.dtype, runtime.device, runtime.attention)
    checkpoints.check_logits(model)
    nll = shift.token_nll(model, shown, runtime.inference_batch_size)
    return {name: -fmean(values) for name, values in zip(names, nll, strict=True)}
