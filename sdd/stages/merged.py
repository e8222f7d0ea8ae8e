"""Stage `merged`: students of one base become one checkpoint, and how far apart they stood is written down."""

import logging
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdd.architectures.configs import stated_dtype
from sdd.config import MERGE_SETTINGS, plain
from sdd.errors import UserError
from sdd.merging.formulas import is_nearly_parallel
from sdd.merging.streaming import merge_checkpoints
from sdd.merging.students import open_students
from sdd.planning import estimates
from sdd.planning.estimates import Estimate
from sdd.stages import tuned
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.stages.student import base_of
from sdd.store import Recipe
from sdd.store.files import write_json
from sdd.study import Study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged(Spec):
    """The method and those of its settings that it has; `dtype` where tensors are stored wider than the base's."""

    method: str
    t: Any = None
    space: str | None = None
    weights: list[float] | None = None
    density: float | None = None
    dtype: str | None = None


# ---- what is asked for --------------------------------------------------------------------------------------------


def recipe(study: Study) -> Recipe:
    merge = plain(study.config.merge)
    inputs = {}
    for number, student in enumerate(study.students):
        inputs[f"student{number}"] = _of_student(study, number, student)
        study.sources |= student.sources
    _check_students(inputs)
    settings = {}
    for key in MERGE_SETTINGS[merge["method"]]:
        settings[key] = _floats(merge[key]) if key != "weights" else _floats(merge[key] or [1] * len(inputs))
    spec = Merged(merge["method"], dtype=study.models.wider, **settings)
    if spec.t is not None:
        _check_kinds(study, spec.t)
    datasets = dict.fromkeys(tuned_student.labels["dataset"] for tuned_student in inputs.values())
    return study.recipe("merged", spec, inputs, {"dataset": "+".join(datasets), "merge": merge["method"]})


def _floats(value: Any) -> Any:
    """The value with integers as floats, containers included, so that 1 and 1.0 are one setting."""
    if isinstance(value, dict):
        return {str(key): _floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_floats(item) for item in value]
    return float(value) if isinstance(value, int) else value


def _of_student(study: Study, number: int, student: Study) -> Recipe:
    try:
        if student.config.finetune.mode == "none":
            raise UserError("finetune=none tunes nothing; choose finetune=sft or finetune=self_distill")
        if student.models.digest != study.models.digest:
            raise UserError("it has another model; choose the model for the whole command")
        return tuned.recipe(student)
    except UserError as error:
        raise UserError(f"merge.students[{number}]: {error}") from None


def _check_students(inputs: dict[str, Recipe]) -> None:
    """Refuse students of different bases, and one student twice."""
    seen: dict[str, str] = {}
    first = inputs["student0"].inputs.get("pruned")
    for name, recipe in inputs.items():
        number, base = name.removeprefix("student"), recipe.inputs.get("pruned")
        if base != first:
            stands = [f"pruned/{one.address}" if one else "the unpruned model" for one in (first, base)]
            raise UserError(
                f"merge.students[{number}] stands on {stands[1]}, [0] on {stands[0]}; merge students of one base"
            )
        if recipe.address in seen:
            raise UserError(
                f"merge.students[{number}] is the same student as [{seen[recipe.address]}] "
                f"(tuned/{recipe.address}); choose another, for example by its seed"
            )
        seen[recipe.address] = number


def _check_kinds(study: Study, t: Any) -> None:
    names: set[str] = study.models.known(lambda: set(study.models.checkpoint.tensors), set())
    parts = {part for name in names for part in name.split(".")}
    for kind in t if isinstance(t, dict) and parts else ():
        if kind != "default" and kind not in parts:
            known = ", ".join(sorted(part for part in parts - {"weight"} if not part.isdigit()))
            raise UserError(f"merge.t: no kind of tensor {kind}; choose default or from {known}")


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    dtype = Merged.read(recipe.spec).dtype or sizes.stored
    cost_model, written = sizes.student(sizes.stored), sizes.student(dtype)
    in_full, method = sizes.config.adapter.method == "full", str(recipe.spec["method"])
    return estimates.merged(cost_model, written, len(recipe.inputs), in_full, method)


# ---- building -----------------------------------------------------------------------------------------------------


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """A stock checkpoint in the dtype of the base's or a wider one, and `merging.json`."""
    spec = Merged.read(recipe.spec)
    folders = [inputs[f"student{number}"] for number in range(len(inputs))]
    base = base_of(folders[0], runtime)
    facts = merge_checkpoints(base, open_students(folders), spec.key(), folder, spec.dtype)
    spread = {space: angles(facts["tensors"], key) for space, key in ANGLES.items()}
    note = parallel_note(spec.key(), spread)
    log.info("merged %d tensors, %d copied; %s", len(facts["tensors"]), len(facts["copied"]), note)
    write_json(
        folder / "merging.json",
        {
            **recipe.spec,
            "students": [place.name for place in folders],
            "base": base.folder.name if base.folder.parent.name == "pruned" else None,
            "dtype": spec.dtype or stated_dtype(base.config),
            "angles": spread,
            "note": note,
            **facts,
        },
    )


ANGLES = {"weights": "angles", "task_vectors": "task_vector_angles"}
"""Space -> the key of its angles in what was measured of a tensor."""


def angles(tensors: dict[str, Any], key: str) -> dict[str, Any]:
    """Over all pairs of students and all tensors that one of them changes: angles in radians, and the nearly parallel.

    A zero task vector has no angle and is not counted.
    """
    known = [theta for facts in tensors.values() for theta in facts[key] if theta is not None]
    return {
        "median": statistics.median(known) if known else None,
        "max": max(known, default=None),
        "nearly_parallel": sum(map(is_nearly_parallel, known)),
        "measured": len(known),
    }


def parallel_note(method: dict[str, Any], spread: dict[str, dict[str, Any]]) -> str:
    """In words, how far apart the students are, and what SLERP comes to where they are nearly parallel."""
    shown = {space: _shown(one) for space, one in spread.items()}
    text = f"angles between students: {shown['weights']} in weights, {shown['task_vectors']} in task vectors"
    if method["method"] != "slerp":
        return text
    used = spread[method["space"]]
    if not used["nearly_parallel"]:
        return text
    text += f"; {used['nearly_parallel']} of {used['measured']} tensors are nearly parallel, where SLERP is a linear"
    text += " interpolation"
    return text + (
        "; merge.space=task_vectors interpolates what fine-tuning added" if method["space"] == "weights" else ""
    )


def _shown(one: dict[str, Any]) -> str:
    if not one["measured"]:
        return "none"
    return f"median {math.degrees(one['median']):.3g}°, max {math.degrees(one['max']):.3g}°"
