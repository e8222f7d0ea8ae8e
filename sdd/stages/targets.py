"""Stage `targets`: the answers that a student is trained on, each with where it came from and why."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from sdd.analysis import shift
from sdd.errors import UserError
from sdd.finetuning.losses import needed
from sdd.finetuning.modes import MODES, REQUESTS
from sdd.forward.given import Given
from sdd.models import checkpoints
from sdd.models.chats import training_ids
from sdd.planning import estimates
from sdd.planning.cost_model import BYTES, CostModel
from sdd.planning.estimates import Estimate
from sdd.rewriting.engines import Request, chunk_rows
from sdd.rewriting.journal import Journal
from sdd.rewriting.judging import TEMPLATE, UNAIDED_TEMPLATE, Judge, question, verdict
from sdd.rewriting.selection import (
    Selection,
    answer_correct,
    choose_target,
    chosen,
    eligible,
    shortest,
    task_of,
    with_noise,
)
from sdd.stages import rewrites
from sdd.stages.datasets import read_examples, selection_for
from sdd.stages.rewrites import Rewrites
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.store import SCRATCH, Recipe
from sdd.store.files import Lines, read_jsonl, write_json, write_jsonl
from sdd.study import Study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Targets(Spec):
    """`dataset` where answers of the dataset are the targets; where rewrites are, how they are chosen, which of several
    by `choice` (and by which `judge`), and whether refused ones are kept beside the targets."""

    mode: str
    dataset: dict[str, Any] | None = None
    rule: Any = None
    leak_phrases: Any = None
    select: bool | None = None
    gold_share: float | None = None
    noise_share: float = 0.0
    rejected: bool = False
    choice: str = "first"
    judge: dict[str, Any] | None = None


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
    how = {"rejected": rejected, "choice": choice, "judge": _judge_of(study) if choice == "judge" else None}
    spec = Targets(mode.name, **selection, select=finetune.select, **shares, **how)
    by_answer = finetune.select or finetune.noise_share or choice == "answer_correct"
    raised = REQUESTS[finetune.request] is None and rows.judged_anew and bool(by_answer)
    return study.recipe("targets", spec, {"rewrites": rewrites.recipe(study)}, rows.labels, raised)


def _judge_of(study: Study) -> dict[str, Any]:
    """Who judges and what it is asked, which is shown a reference where the teacher was."""
    judge = study.config.judge
    own = TEMPLATE if REQUESTS[study.config.finetune.request] is None else UNAIDED_TEMPLATE
    return {"model": judge.model, "template": judge.template or own, "max_new_tokens": judge.max_new_tokens}


def check(runtime: Runtime, recipe: Recipe) -> None:
    """Have a judge say one word, so that a wrong address, key or name is known before any work."""
    if judge := recipe.spec.get("judge"):
        asking = _asking(runtime, judge)
        asking.check(asking.place)


LESS = ("trainer.inference_batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    """No model but where one measures how likely it finds every try."""
    needed = estimates.targets(sizes.rows, sizes.prompt + 2 * sizes.answer)
    if recipe.spec.get("choice") != "most_likely":
        return replace(needed, elsewhere=recipe.spec.get("judge") is not None)
    made = recipe.inputs["rewrites"]
    asked, tries = Rewrites.read(made.spec), rewrites.expected(sizes, made)
    shape = sizes.shape_of(asked.teacher)
    teacher = CostModel(shape, shape.blocks, BYTES[asked.dtype], sizes.device)
    passed = sizes.shown(asked.dtype, round(tries.tries * sizes.rows), sizes.prompt + tries.new, teacher)
    return replace(passed, seconds=passed.seconds + needed.seconds, disk=needed.disk)


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`train.jsonl` with a reason for every row, and `summary.json` with the count of each; every answer of a judge
    survives a kill."""
    spec = Targets.read(recipe.spec)
    dataset = recipe.inputs["rewrites"].spec["dataset"] if "rewrites" in inputs else spec.dataset
    assert dataset is not None, "targets are made of rewrites or of a dataset"
    examples, reasons = read_examples(runtime, dataset), Counter[str]()
    groups = Counter(e.group for e in examples if e.group is not None)
    rows: Iterable[dict[str, Any]]
    verdicts: Mapping[str, int | None] = {}
    if "rewrites" in inputs:
        del examples
        if spec.judge:
            verdicts = _verdicts(runtime, spec.judge, _tries(spec, inputs["rewrites"]), folder / SCRATCH)
        asked, scratch = Rewrites.read(recipe.inputs["rewrites"].spec), folder / SCRATCH
        scratch.mkdir(exist_ok=True)
        rows = _chosen(runtime, spec, asked, inputs["rewrites"], verdicts, scratch)
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
    if spec.judge:
        facts["judged"] = {"asked": len(verdicts), "unread": sum(place is None for place in verdicts.values())}
        log.info("judge: %(asked)d rows asked about, %(unread)d answers not to be read", facts["judged"])
    write_json(folder / "summary.json", facts)


def _selection(spec: Targets, row: Mapping[str, Any]) -> Selection:
    return selection_for(spec.rule, spec.leak_phrases, row["id"])


def _judged(spec: Targets, row: Mapping[str, Any]) -> Selection | None:
    return _selection(spec, row) if spec.select else None


def _tries(spec: Targets, rewrites: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Every row, and its rewrites that may be the target."""
    for row in read_jsonl(rewrites / "rewrites.jsonl"):
        yield row, eligible(row, _judged(spec, row))


def _chosen(
    runtime: Runtime,
    spec: Targets,
    asked: Rewrites,
    rewrites: Path,
    verdicts: Mapping[str, int | None],
    scratch: Path,
) -> Iterable[dict[str, Any]]:
    """Of every row the rewrite, or the reference where that is not good enough; noise goes through them twice."""

    def choice(row: dict[str, Any]) -> Callable[[list[str]], str]:
        if spec.choice == "most_likely":
            return lambda texts: max(texts, key=lambda text: next(likely) if len(texts) > 1 else 0.0)
        if spec.choice == "judge":
            return lambda texts: texts[verdicts.get(row["id"]) or 0]
        return shortest if spec.choice == "shortest" else answer_correct(_selection(spec, row), row["reference"])

    def written() -> Iterator[dict[str, Any]]:
        for row in read_jsonl(rewrites / "rewrites.jsonl"):
            yield row if spec.choice == "first" else chosen(row, _judged(spec, row), choice(row))

    if spec.choice == "most_likely":
        likely = iter(_likelihoods(runtime, asked, _tries(spec, rewrites), scratch))
    rows = (
        choose_target(row, _judged(spec, row), spec.gold_share or 0.0, keep_rejected=spec.rejected) for row in written()
    )
    if not spec.noise_share:
        return rows
    write_jsonl(scratch / "chosen.jsonl", rows)
    return with_noise(Lines(scratch / "chosen.jsonl"), spec.noise_share, partial(_selection, spec))


def _verdicts(
    runtime: Runtime, judge: dict[str, Any], rows: Iterable[tuple[dict[str, Any], list[str]]], scratch: Path
) -> dict[str, int | None]:
    """By row with several rewrites to choose among, the place of the one that the judge says, or None where it says
    none; answers are kept in `scratch` as they come."""
    asking, several = _asking(runtime, judge), ((row, texts) for row, texts in rows if len(texts) > 1)
    scratch.mkdir(exist_ok=True)
    verdicts: dict[str, int | None] = {}
    chunks = iter(lambda: list(itertools.islice(several, chunk_rows(asking.place.at_once))), [])
    for number, chunk in enumerate(chunks):
        questions = [
            Request(row["id"], question(judge["template"], task_of(row), row["reference"], texts, row["id"]))
            for row, texts in chunk
        ]
        numbers = {row["id"]: len(texts) for row, texts in chunk}
        for completion in Journal(asking, scratch / f"{number:06d}.answers.jsonl").complete(questions):
            verdicts[completion.id] = verdict(completion, numbers[completion.id])
    return verdicts


def _asking(runtime: Runtime, judge: dict[str, Any]) -> Judge:
    return Judge(judge["model"], judge["max_new_tokens"], runtime.servers.get("judge"))


def _likelihoods(
    runtime: Runtime, asked: Rewrites, rows: Iterable[tuple[dict[str, Any], list[str]]], scratch: Path
) -> list[float]:
    """Of every rewrite of every row with several to choose among, in this order, the mean log-probability of its tokens
    to the teacher, who is shown the bare task."""
    checkpoint = runtime.checkpoint(asked.teacher, "teacher")
    tokenizer, shown = checkpoint.tokenizer(), Given(scratch)
    for row, texts in rows:
        for text in texts if len(texts) > 1 else ():
            shown.append(*training_ids(tokenizer, row["prompt"], text, asked.system_prompt, row.get("before", ())))
    if not shown:
        return []
    model = checkpoint.model(asked.dtype, runtime.placed, runtime.attention)
    checkpoints.check_logits(model)
    of_row, kept = (lambda values: -fmean(values)), scratch / "likelihoods"
    return shift.token_nll(model, shown, runtime.inference_batch_size, of_row, kept)
