"""Stage `surprisals`: how likely the unpruned model finds targets, whoever wrote them; all their students share it."""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import mul
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from sdd.analysis import shift
from sdd.errors import UserError
from sdd.forward import ranks
from sdd.forward.given import Given
from sdd.models import checkpoints
from sdd.models.chats import task_text, training_ids
from sdd.planning.estimates import Estimate
from sdd.stages import targets
from sdd.stages.runtime import Runtime
from sdd.stages.sharing import shared
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.store import SCRATCH, Recipe
from sdd.store.files import read_jsonl, write_json, write_jsonl
from sdd.study import Study

TEXTS, TOO_LONG = ("target", "reference"), -1
"""What of a row is looked at, and where a text stands that is not."""


@dataclass(frozen=True)
class Surprisals(Spec):
    model: str
    dtype: str
    system_prompt: str | None
    max_length: int
    chat_template: str | None = None


def recipe(study: Study) -> Recipe:
    config, models = study.config, study.models
    spec = Surprisals(
        model=models.digest,
        dtype=models.dtype("analysis"),
        system_prompt=config.dataset.system_prompt,
        max_length=config.finetune.max_length,
        chat_template=models.plain_template(models.digest),
    )
    return study.recipe("surprisals", spec, {"targets": targets.recipe(study)}, study.rows.labels)


LESS = ("trainer.inference_batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    return sizes.shown(Surprisals.read(recipe.spec).dtype, 2 * sizes.rows, sizes.prompt + sizes.answer)


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`rows.jsonl` ({"id", "source", "reason"}, tokens and NLL of target and of reference) and `surprisals.json`."""
    if shared(build, runtime, recipe, inputs, folder):
        return
    spec = Surprisals.read(recipe.spec)
    source = runtime.checkpoint(spec.model)
    tokenizer = source.tokenizer()
    model = source.model(spec.dtype, runtime.placed, runtime.attention)
    checkpoints.check_logits(model)
    train, shown, known = inputs["targets"] / "train.jsonl", Given(folder), dict[bytes, int]()
    places: dict[str, array[int]] = {text: array("q") for text in TEXTS}
    for row in read_jsonl(train):
        task = task_text(row["prompt"], row.get("before", ()))
        for text, its in places.items():
            name = blake2b(json.dumps([task, row[text]]).encode(), digest_size=16).digest()
            if name not in known:
                ids, prompt = training_ids(
                    tokenizer, row["prompt"], row[text], spec.system_prompt, row.get("before", ())
                )
                known[name] = len(shown) if len(ids) <= spec.max_length else TOO_LONG
                if known[name] != TOO_LONG:
                    shown.append(ids, prompt)
            its.append(known[name])
    known.clear()
    (folder / SCRATCH).mkdir(exist_ok=True)
    nll = shift.token_nll(model, shown, runtime.inference_batch_size, fmean, folder / SCRATCH / "nll")
    if ranks.rank() > 0:
        return
    reasons = Counter[str]()

    def records() -> Iterator[dict[str, Any]]:
        for row, *its in zip(read_jsonl(train), *places.values(), strict=True):
            reasons[row["reason"]] += 1
            if TOO_LONG in its:
                continue
            record = {key: row[key] for key in ("id", "source", "reason")}
            for text, place in zip(TEXTS, its, strict=True):
                record |= {f"{text}_tokens": shown.answers[place], f"{text}_nll": nll[place]}
            yield record

    write_jsonl(folder / "rows.jsonl", records())
    result = surprise(read_jsonl(folder / "rows.jsonl"))
    if not result["rows"]:
        raise UserError(f"finetune.max_length={spec.max_length} is shorter than every training row")
    result = {"over_max_length": reasons.total() - result["rows"], **result, "reasons": dict(reasons)}
    write_json(folder / "surprisals.json", result)


def surprise(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """NLL in nats per token and lengths in tokens of targets and references, over all rows and over rewritten ones."""
    kept = {name: {text: (array("d"), array("q")) for text in TEXTS} for name in ("all", "rewritten")}
    for record in records:
        for name in kept if record["source"] == "rewrite" else ("all",):
            for text, (nll, tokens) in kept[name].items():
                nll.append(record[f"{text}_nll"])
                tokens.append(record[f"{text}_tokens"])
    summary: dict[str, Any] = {"rows": len(kept["all"]["target"][1])}
    for name, texts in kept.items():
        if not texts["target"][1]:
            continue
        summary[name] = {"rows": len(texts["target"][1])}
        for text, (nll, tokens) in texts.items():
            total = sum(map(mul, nll, tokens))
            summary[name][text] = {"nll": total / sum(tokens), "tokens": lengths(tokens)}
    return summary


def lengths(tokens: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of lengths in tokens, or of other numbers."""
    cuts = quantiles(tokens, n=20, method="inclusive") if len(tokens) > 1 else [float(tokens[0])] * 19
    return {"mean": fmean(tokens), "p5": cuts[0], "p50": cuts[9], "p95": cuts[18]}
