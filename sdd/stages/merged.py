"""Stage `merged`: students of one base become one checkpoint, and how far apart they stood is written down."""

import logging
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdd.merging.formulas import is_nearly_parallel
from sdd.merging.streaming import merge_checkpoints
from sdd.merging.students import open_students
from sdd.models import checkpoints
from sdd.stages.runtime import Runtime, write_json
from sdd.stages.student import base_folder
from sdd.store import Recipe

log = logging.getLogger(__name__)


def build_merged(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """A stock checkpoint in the dtype of the base's, and `merging.json`."""
    folders = [inputs[f"student{number}"] for number in range(len(inputs))]
    base = base_folder(folders[0], runtime)
    facts = merge_checkpoints(base, open_students(folders), recipe.spec, folder)
    config = checkpoints.read_config(base)
    found = {space: angles(facts["tensors"], key) for space, key in ANGLES.items()}
    note = parallel_note(recipe.spec, found)
    log.info("merged %d tensors, %d copied; %s", len(facts["tensors"]), len(facts["copied"]), note)
    write_json(
        folder / "merging.json",
        {
            **recipe.spec,
            "students": [place.name for place in folders],
            "base": base.name if base.parent.name == "pruned" else None,
            "dtype": config.get("dtype") or config.get("torch_dtype"),
            "angles": found,
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


def parallel_note(method: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """In words, how far apart the students are, and what SLERP comes to where they are nearly parallel."""
    shown = {space: _shown(one) for space, one in found.items()}
    text = f"angles between students: {shown['weights']} in weights, {shown['task_vectors']} in task vectors"
    if method["method"] != "slerp":
        return text
    used = found[method["space"]]
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
