"""Stage `measured`: what the student and the unpruned model cost.

`costs.json` follows from the recipe. `timings.json` is what the machine that built the artifact took, both models in
one run and in turns; it names that machine, is no content of the recipe, and is taken once, when the artifact is built.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdd.analysis import costs
from sdd.planning.estimates import Estimate
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.stages.student import checkpoint_of, open_student
from sdd.store import TIMINGS, Recipe
from sdd.store.files import write_json
from sdd.study import Study


@dataclass(frozen=True)
class Measured(Spec):
    dtype: str
    model: str
    context: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int


def recipe(study: Study, student: Recipe) -> Recipe:
    settings = study.config.analysis
    own = {key: settings[key] for key in ("context", "prompt_tokens", "new_tokens", "batch_size", "repeats")}
    spec = Measured(study.models.dtype("analysis"), study.models.digest, **own)
    return study.recipe("measured", spec, {"model": student}, student.labels)


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    spec = Measured.read(recipe.spec)
    cost_model = sizes.cost_model(sizes.shape.blocks, spec.dtype)
    lengths = spec.prompt_tokens, spec.new_tokens
    spent = [cost_model.generation(batch, *lengths, batch) for batch in (1, spec.batch_size)]
    seconds = 2 * (spec.repeats + 1) * sum(duration for duration, _ in spent)
    return Estimate(2 * cost_model.opening + seconds, 2 * cost_model.weights + 2 * max(held for _, held in spent), 1e4)


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`costs.json` and `timings.json`, each of both models."""
    spec = Measured.read(recipe.spec)
    teacher, student = runtime.checkpoint(spec.model), checkpoint_of(inputs["model"], runtime)
    both = {"teacher": teacher, "student": student}
    counted = {name: costs.counted(model, spec.context, spec.dtype) for name, model in both.items()}
    adapter = inputs["model"] / "adapter" / "adapter_model.safetensors"
    write_json(
        folder / "costs.json",
        {
            "dtype": spec.dtype,
            "context": spec.context,
            **counted,
            "adapter_bytes": adapter.stat().st_size if adapter.is_file() else 0,
            "saved": costs.saved(counted["teacher"], counted["student"]),
        },
    )
    if not spec.repeats:
        return
    opened = {
        "teacher": teacher.model(spec.dtype, runtime.placed, runtime.attention),
        "student": open_student(inputs["model"], runtime, spec.dtype)[0],
    }
    settings = spec.prompt_tokens, spec.new_tokens, spec.batch_size, spec.repeats
    timings = costs.measured(opened, *settings, runtime.device)
    how = {key: getattr(spec, key) for key in ("prompt_tokens", "new_tokens", "batch_size")}
    write_json(folder / TIMINGS, {"machine": costs.machine(runtime.device, spec.dtype), **how, **timings})
