"""Stage `damaged`: what a cut took from every target, in nats per token; every draw from these rows shares it.

It compares the pruned model as it was cut with the unpruned one, whose part is `surprisals`.
"""

import logging
import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sdd.analysis import shift
from sdd.data.draws import Damage, mean
from sdd.errors import UserError
from sdd.forward.given import Given
from sdd.models import checkpoints
from sdd.models.chats import training_ids
from sdd.models.checkpoints import Checkpoint
from sdd.planning.estimates import Estimate
from sdd.stages import pruned, surprisals, targets
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.store import SCRATCH, Recipe
from sdd.store.files import read_jsonl, write_json, write_jsonl
from sdd.study import Study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damaged(Spec):
    dtype: str
    system_prompt: str | None


def recipe(study: Study, why: str) -> Recipe:
    """`why` is the setting that asks for it."""
    cut = pruned.recipe(study)
    if cut is None:
        raise UserError(f"{why}=damage: nothing is cut that could do damage; add for example pruning=n2")
    spec = Damaged(study.models.dtype("analysis"), study.config.dataset.system_prompt)
    inputs = {"targets": targets.recipe(study), "surprisals": surprisals.recipe(study), "pruned": cut}
    return study.recipe("damaged", spec, inputs, study.rows.labels)


LESS = ("trainer.inference_batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    dtype = Damaged.read(recipe.spec).dtype
    return sizes.shown(dtype, sizes.rows, sizes.prompt + sizes.answer, sizes.student(dtype))


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`rows.jsonl` ({"id", "tokens", "unpruned_nll", "pruned_nll", "damage"}, nats per token) and `damaged.json`.

    A row that the unpruned model was not shown, since its target or its reference is too long, is left out.
    """
    spec = Damaged.read(recipe.spec)
    unpruned = {row["id"]: row["target_nll"] for row in read_jsonl(inputs["surprisals"] / "rows.jsonl")}
    source = Checkpoint(inputs["pruned"])
    tokenizer = source.tokenizer()
    shown, ids = Given(folder), []
    for row in read_jsonl(inputs["targets"] / "train.jsonl"):
        if row["id"] in unpruned:
            shown.append(
                *training_ids(tokenizer, row["prompt"], row["target"], spec.system_prompt, row.get("before", ()))
            )
            ids.append(row["id"])
    model = source.model(spec.dtype, runtime.placed, runtime.attention)
    checkpoints.check_logits(model)
    (folder / SCRATCH).mkdir(exist_ok=True)
    nll = shift.token_nll(model, shown, runtime.inference_batch_size, fmean, folder / SCRATCH / "nll")
    damages = array("d")

    def records() -> Iterator[dict[str, Any]]:
        for id, number, after in zip(ids, shown.answers, nll, strict=True):
            before = unpruned[id]
            if not math.isfinite(after - before):
                raise UserError(f"analysis.dtype={spec.dtype}: a likelihood of row {id} is not finite; choose float32")
            damages.append(after - before)
            record = {"id": id, "tokens": number, "unpruned_nll": before, "pruned_nll": after}
            yield record | {"damage": after - before}

    write_jsonl(folder / "rows.jsonl", records())
    total = mean(map(Damage, damages, shown.answers))
    facts = {"rows": len(damages), "damage": total, "of_rows": surprisals.lengths(damages)}
    write_json(folder / "damaged.json", facts)
    log.info("the cut took %.3f nats per target token", total)
