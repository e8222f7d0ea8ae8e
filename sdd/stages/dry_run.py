"""A dry run: for every artifact that a command asks for, whether it exists, and an estimate of what building it takes.

Builds and fetches nothing.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from sdd.planning.cost_model import DEVICES
from sdd.planning.estimates import Estimate
from sdd.planning.requirements import duration, size
from sdd.stages import graph
from sdd.stages.sizes import Sizes
from sdd.store import Recipe, Store
from sdd.study import Study, is_provisional


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


def planned(wanted: Recipe, study: Study, store: Store) -> list[Planned]:
    """All that `wanted` stands on and itself, inputs first."""
    estimate_of = estimator(study)
    steps = []
    for recipe in wanted.walk():
        provisional = is_provisional(recipe)
        exists = not provisional and store.has(recipe)
        steps.append(Planned(recipe, exists, provisional, estimate_of(recipe)))
    return steps


def estimator(study: Study) -> Callable[[Recipe], Estimate]:
    """What building each artifact of a study takes, by the sizes of the student that it belongs to."""
    whole = Sizes(study)
    of_student: dict[str, Sizes] = {}
    for other in study.others:
        made = graph.student(other)
        addresses = [recipe.address for recipe in made.walk()] if made else []
        of_student = dict.fromkeys(addresses, Sizes(other)) | of_student
    return lambda recipe: estimate(of_student.get(recipe.address, whole), recipe)


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    """What building one artifact takes, its inputs being there."""
    needed: Estimate = import_module(f"sdd.stages.{recipe.stage}").estimate(sizes, recipe)
    return needed


def lines(plan: list[Planned]) -> list[str]:
    """One line an artifact: state, name, estimate, inputs."""
    provisional = {planned.recipe.address: planned.provisional for planned in plan}
    rows = []
    for one in plan:
        state, cost = "exists", size(one.estimate.disk) + " disk"
        if not one.exists:
            state = "would be built"
            cost = f"~{duration(one.estimate.seconds)}, {size(one.estimate.memory)} memory, {cost}"
        inputs = [named(recipe, provisional[recipe.address]) for recipe in one.recipe.inputs.values()]
        rows.append(f"{state:<15} {one.name:<27} {cost}" + (f"  <- {', '.join(inputs)}" if inputs else ""))
    return rows


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
