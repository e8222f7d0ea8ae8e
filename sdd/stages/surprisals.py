"""Stage `surprisals`: how likely the unpruned model finds targets, whoever wrote them; all their students share it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from sdd.analysis import shift
from sdd.errors import UserError
from sdd.forward import ranks
from sdd.forward.teacher_forcing import Row
from sdd.models import checkpoints
from sdd.models.chats import task_text, training_ids
from sdd.planning.estimates import Estimate
from sdd.stages import targets
from sdd.stages.runtime import Runtime
from sdd.stages.sharing import shared
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.store import Recipe
from sdd.store.files import read_jsonl, write_json, write_jsonl
from sdd.study import Study


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
    rows = list(read_jsonl(inputs["targets"] / "train.jsonl"))
    shown: dict[tuple[str, str], Row] = {}
    tasks = [task_text(row["prompt"], row.get("before", ())) for row in rows]
    for row, task in zip(rows, tasks, strict=True):
        for text in (row["target"], row["reference"]):
            ids, prompt = training_ids(tokenizer, row["prompt"], text, spec.system_prompt, row.get("before", ()))
            if len(ids) <= spec.max_length:
                shown[task, text] = ids[:prompt], ids[prompt:]
    nll = dict(zip(shown, shift.token_nll(model, list(shown.values()), runtime.inference_batch_size), strict=True))
    if ranks.rank() > 0:
        return
    records = []
    for row, task in zip(rows, tasks, strict=True):
        texts = {name: nll.get((task, row[name])) for name in ("target", "reference")}
        if all(texts.values()):
            record = {key: row[key] for key in ("id", "source", "reason")}
            for name, values in texts.items():
                assert values is not None
                record |= {f"{name}_tokens": len(values), f"{name}_nll": fmean(values)}
            records.append(record)
    if not records:
        raise UserError(f"finetune.max_length={spec.max_length} is shorter than every training row")
    write_jsonl(folder / "rows.jsonl", records)
    result = {"over_max_length": len(rows) - len(records), **surprise(records)}
    result["reasons"] = dict(Counter(row["reason"] for row in rows))
    write_json(folder / "surprisals.json", result)


def surprise(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """NLL in nats per token and lengths in tokens of targets and references, over all rows and over rewritten ones."""
    kept = {"all": records, "rewritten": [record for record in records if record["source"] == "rewrite"]}
    summary: dict[str, Any] = {"rows": len(records)}
    for name, chosen in kept.items():
        if not chosen:
            continue
        summary[name] = {"rows": len(chosen)}
        for text in ("target", "reference"):
            tokens = [record[f"{text}_tokens"] for record in chosen]
            total = sum(record[f"{text}_nll"] * record[f"{text}_tokens"] for record in chosen)
            summary[name][text] = {"nll": total / sum(tokens), "tokens": lengths(tokens)}
    return summary


def lengths(tokens: Sequence[float]) -> dict[str, float]:
    """Mean and percentiles of lengths in tokens, or of other numbers."""
    cuts = quantiles(tokens, n=20, method="inclusive") if len(tokens) > 1 else [float(tokens[0])] * 19
    return {"mean": fmean(tokens), "p5": cuts[0], "p50": cuts[9], "p95": cuts[18]}
