"""Stage `shifted`: how far a student is from the unpruned model, over both models' answers to held-out prompts.

Prompts that the student was trained on are left out.
"""

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sdd.analysis import shift
from sdd.forward import ranks
from sdd.planning.estimates import Estimate
from sdd.stages import answered, surprisals
from sdd.stages.answered import Answered, shown
from sdd.stages.runtime import Runtime
from sdd.stages.sharing import shared
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.stages.surprisals import lengths
from sdd.store import Recipe
from sdd.store.files import read_facts, read_jsonl, write_json, write_jsonl
from sdd.study import Study
from sdd.study.models import STAND_IN

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shifted(Spec):
    """`embedder` is the digest of what measures the similarity of answers, where there is one."""

    dtype: str
    embedder: str | None = None


def recipe(study: Study, student: Recipe) -> Recipe:
    inputs = {"model": student, "answers": answered.recipe(study, None)}
    labels = student.labels | {"prompts": inputs["answers"].labels["dataset"]}
    inputs["responses"] = answered.recipe(study, student)
    if student.stage == "tuned":
        inputs["surprisals"] = surprisals.recipe(study)
    return study.recipe("shifted", Shifted(study.models.dtype("analysis"), _embedder(study)), inputs, labels)


def _embedder(study: Study) -> str | None:
    """The embedder's digest for the key; None where there is none, or nothing to open it with."""
    path, revision = study.config.analysis.embedder, study.config.analysis.embedder_revision
    if path is None:
        return None
    if importlib.util.find_spec("sentence_transformers") is None:
        log.info("no embedding similarity: it needs sentence-transformers; run: pip install 'sdd[shift]'")
        return None
    folder = shift.embedder_folder(path, revision, fetch=not study.config.dry_run)
    if folder is None:
        return f"{STAND_IN}{path}@{revision}"
    digest = shift.embedder_digest(folder, study.digest_memory)
    study.sources[digest] = folder
    return digest


LESS = ("trainer.inference_batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    asked = Answered.read(recipe.inputs["answers"].spec)
    needed = sizes.shown(Shifted.read(recipe.spec).dtype, 2 * asked.held_out, sizes.prompt + asked.max_new_tokens)
    return Estimate(needed.seconds, 2 * needed.memory, needed.disk)


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`prompts.jsonl` ({"id", "tokens", "kl", "own_tokens", "similarity"}) and `shift.json`, surprisals included."""
    if shared(build, runtime, recipe, inputs, folder):
        return
    spec, given = Shifted.read(recipe.spec), shown(runtime, recipe, inputs)
    own = {row["id"]: row for row in read_jsonl(inputs["responses"] / "answers.jsonl")}
    kl = shift.token_kl(given.teacher, given.student, given.rows, runtime.inference_batch_size)
    if ranks.rank() > 0:
        return
    records = [
        {"id": answer["id"], "tokens": len(values), "kl": fmean(values), "own_tokens": len(own[answer["id"]]["tokens"])}
        for answer, values in zip(given.answers, kl, strict=True)
    ]
    result: dict[str, Any] = {"prompts": len(records), "tokens": sum(record["tokens"] for record in records)}
    result["kl"] = sum(record["kl"] * record["tokens"] for record in records) / result["tokens"]
    result["tokens_per_answer"] = {
        "teacher": lengths([record["tokens"] for record in records]),
        "student": lengths([record["own_tokens"] for record in records]),
    }
    if spec.embedder is not None:
        texts = [own[answer["id"]]["text"] for answer in given.answers]
        embedder = runtime.source(spec.embedder, "embedder")
        similarities = shift.similarities(embedder, texts, [answer["text"] for answer in given.answers], runtime.device)
        for record, similarity in zip(records, similarities, strict=True):
            record["similarity"] = similarity
        result["similarity"] = {"mean": fmean(similarities), "histogram": shift.histogram(similarities)}
    write_jsonl(folder / "prompts.jsonl", records)
    if "surprisals" in inputs:
        result["targets"] = read_facts(inputs["surprisals"] / "surprisals.json")
    write_json(folder / "shift.json", result)
    log.info("KL to the unpruned model: %.4f nats per token", result["kl"])
