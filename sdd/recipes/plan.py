"""A dry run: for every artifact that a command asks for, whether it exists, and an estimate of what building it takes.

Builds and fetches nothing.
"""

from dataclasses import asdict, dataclass
from typing import Any

from sdd.evaluation.suites import SUITES
from sdd.planning import estimates
from sdd.planning.estimates import Estimate, Training
from sdd.planning.work import DEVICES, Shape, Work
from sdd.recipes import Recipes, is_provisional
from sdd.recipes.counts import Counts
from sdd.store import Recipe, Store


@dataclass(frozen=True)
class Planned:
    """One artifact; a provisional address is another one once everything has been fetched."""

    recipe: Recipe
    exists: bool
    provisional: bool
    estimate: Estimate

    @property
    def name(self) -> str:
        return named(self.recipe, self.provisional)

    def record(self) -> dict[str, Any]:
        return {"artifact": self.name, "exists": self.exists, **asdict(self.estimate)}


def named(recipe: Recipe, provisional: bool) -> str:
    return f"{recipe.stage}/{'?' if provisional else ''}{recipe.address}"


def planned(wanted: Recipe, recipes: Recipes, store: Store) -> list[Planned]:
    """All that `wanted` stands on and itself, inputs first."""
    whole = Counts(recipes)
    of_student: dict[str, Counts] = {}
    for student in recipes.students:
        of_student |= dict.fromkeys((recipe.address for recipe in student.tuned().walk()), Counts(student))
    found = []
    for recipe in wanted.walk():
        counts = of_student.get(recipe.address, whole)
        provisional = is_provisional(recipe)
        exists = not provisional and store.has(recipe)
        found.append(Planned(recipe, exists, provisional, counts.estimate(recipe)))
    return found


def requirements(shape: Shape) -> list[str]:
    """What each stage of a usual run takes on one GPU: the lines that stand in the header of a model's option."""
    device, blocks = DEVICES["gpu"], max(1, round(shape.blocks * 0.8))
    whole, cut = Work(shape, shape.blocks, 2, device), Work(shape, blocks, 2, device)
    training = Training(estimates.adapter_parameters(shape, blocks, 16, ["all-linear"]))
    tasks = estimates.tasks_of({each.task: (1, each.shots or 0) for each in SUITES["openllm_v1"]})
    stages = {
        "scores, 128 texts of 1,024 tokens": estimates.scores(whole, 128, 1024, 16),
        f"pruned, {shape.blocks - blocks} of {shape.blocks} blocks removed": estimates.pruned(cut),
        "rewrites, 7,473 GSM8K rows": estimates.rewrites(whole, 7473, 210, 144, 32),
        "tuned, 2 epochs of them, rank 16": estimates.tuned(cut, training, 2 * 7373, 160, 32, 4096),
        "evaluated, OpenLLM v1": estimates.evaluated(cut, tasks, None, 8),
    }
    formulas = "by the formulas of sdd/planning/estimates.py, not measured"
    lines = [f"Each stage on {device.name}, {formulas}: time, memory, disk."]
    for what, one in stages.items():
        lines.append(f"  {what:<34} {duration(one.seconds):>7} {size(one.memory):>8} {size(one.disk):>8}")
    return lines


def duration(seconds: float) -> str:
    """Rounded for reading: seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes rounded for reading, in powers of 1,000."""
    if count < 1e8:
        return f"{max(count, 1e4) / 1e6:.2g} MB"
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def lines(plan: list[Planned]) -> list[str]:
    """One line an artifact: state, name, estimate, inputs."""
    provisional = {planned.recipe.address: planned.provisional for planned in plan}
    found = []
    for one in plan:
        state, cost = "exists", size(one.estimate.disk) + " disk"
        if not one.exists:
            state = "would be built"
            cost = f"~{duration(one.estimate.seconds)}, {size(one.estimate.memory)} memory, {cost}"
        inputs = [named(recipe, provisional[recipe.address]) for recipe in one.recipe.inputs.values()]
        found.append(f"{state:<15} {one.name:<27} {cost}" + (f"  <- {', '.join(inputs)}" if inputs else ""))
    return found


def summary(records: list[dict[str, Any]]) -> str:
    """One line about what is still to be built; artifacts that several jobs share are counted once."""
    unique = {record["artifact"]: record for record in records if not record["exists"]}
    seconds = sum(record["seconds"] for record in unique.values())
    disk = sum(record["disk"] for record in unique.values())
    memory = max((record["memory"] for record in unique.values()), default=0.0)
    return (
        f"{len(unique)} artifacts to build: about {duration(seconds)}, at most {size(memory)} memory, {size(disk)} disk"
    )


def assumption(accelerator: str) -> str:
    device = DEVICES[accelerator]
    return (
        f"estimates are for {device.name} (trainer.accelerator={accelerator}; {device.flops[2]:.0e} FLOP/s sustained "
        "in 16 bits) and rough: within a factor of 3"
    )
