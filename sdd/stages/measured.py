"""Stage `measured`: what the student and the unpruned model cost.

`costs.json` follows from the recipe. `timings.json` is what the machine that built the artifact took, both models in
one run and in turns; it names that machine, is no content of the recipe, and is taken once, when the artifact is built.
"""

from collections.abc import Mapping
from pathlib import Path

from sdd.analysis import costs
from sdd.models import checkpoints
from sdd.stages.runtime import Runtime, write_json
from sdd.stages.student import checkpoint_of, open_student
from sdd.store import TIMINGS, Recipe


def build_measured(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`costs.json` and `timings.json`, each of both models."""
    spec = recipe.spec
    folders = {"teacher": runtime.source(spec["model"], "model"), "student": checkpoint_of(inputs["model"], runtime)}
    found = {name: costs.counted(each, spec["context"], spec["dtype"]) for name, each in folders.items()}
    adapter = inputs["model"] / "adapter" / "adapter_model.safetensors"
    write_json(
        folder / "costs.json",
        {
            **{key: spec[key] for key in ("dtype", "context")},
            **found,
            "adapter_bytes": adapter.stat().st_size if adapter.is_file() else 0,
            "saved": costs.saved(found["teacher"], found["student"]),
        },
    )
    if not spec["repeats"]:
        return
    opened = {
        "teacher": checkpoints.load_model(folders["teacher"], spec["dtype"], runtime.device, runtime.attention),
        "student": open_student(inputs["model"], runtime, spec["dtype"])[0],
    }
    counts = spec["prompt_tokens"], spec["new_tokens"], spec["batch_size"], spec["repeats"]
    timings = costs.measured(opened, *counts, runtime.device)
    how = {key: spec[key] for key in ("prompt_tokens", "new_tokens", "batch_size")}
    write_json(folder / TIMINGS, {"machine": costs.machine(runtime.device, spec["dtype"]), **how, **timings})
