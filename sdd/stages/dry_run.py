"""A dry run: for every artifact that a command asks for, whether it exists, and an estimate of what building it takes.

Builds and fetches nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from sdd.planning.cost_model import DEVICES
from sdd.planning.estimates import Estimate
from sdd.planning.fits import GPUS, Fits, fits
from sdd.planning.price import Price
from sdd.planning.requirements import duration, flops, size
from sdd.stages import graph
from sdd.stages.priced import Paid, expected
from sdd.stages.sizes import Sizes
from sdd.store import Recipe, Store
from sdd.study import Study, is_provisional


@dataclass(frozen=True)
class Planned:
    """One artifact; a provisional address is another one once everything has been fetched. `fits` is empty where no
    GPU is asked for; `price` is that of a recovery, with what it stands on."""

    recipe: Recipe
    exists: bool
    provisional: bool
    estimate: Estimate
    fits: Fits
    price: Price | None = None

    @property
    def name(self) -> str:
        return named(self.recipe, self.provisional)

    def record(self) -> dict[str, Any]:
        fits = {str(gpu): settings for gpu, settings in self.fits.items()}
        price = {} if self.price is None else {"price": asdict(self.price)}
        return {"artifact": self.name, "exists": self.exists, **asdict(self.estimate), "fits": fits, **price}


def named(recipe: Recipe, provisional: bool) -> str:
    return f"{recipe.stage}/{'?' if provisional else ''}{recipe.address}"


def planned(wanted: Recipe, study: Study, store: Store) -> list[Planned]:
    """All that `wanted` stands on and itself, inputs first; what two recoveries share is in the first one's price."""
    sizes_of, paid = sizer(study), Paid()
    steps = []
    for recipe in wanted.walk():
        provisional = is_provisional(recipe)
        exists = not provisional and store.has(recipe)
        sizes = sizes_of(recipe)
        needed = estimate(sizes, recipe)
        price = expected(sizes, recipe, paid) if recipe.stage == "tuned" else None
        gpus = {} if exists else fitting(sizes, recipe, needed)
        steps.append(Planned(recipe, exists, provisional, needed, gpus, price))
    return steps


def sizer(study: Study) -> Callable[[Recipe], Sizes]:
    """The sizes of the student that each artifact of a study belongs to."""
    whole = Sizes(study)
    of_student: dict[str, Sizes] = {}
    for other in study.others:
        made = graph.student(other)
        addresses = [recipe.address for recipe in made.walk()] if made else []
        of_student = dict.fromkeys(addresses, Sizes(other)) | of_student
    return lambda recipe: of_student.get(recipe.address, whole)


def estimator(study: Study) -> Callable[[Recipe], Estimate]:
    """What building each artifact of a study takes."""
    sizes_of = sizer(study)
    return lambda recipe: estimate(sizes_of(recipe), recipe)


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    """What building one artifact takes, its inputs being there."""
    needed: Estimate = import_module(f"sdd.stages.{recipe.stage}").estimate(sizes, recipe)
    return needed


def fitting(sizes: Sizes, recipe: Recipe, needed: Estimate) -> Fits:
    """The GPUs that building it fits in, and with which settings; empty where it is on the CPU."""
    if needed.on_cpu or sizes.config.trainer.accelerator != "gpu":
        return {}
    stage = import_module(f"sdd.stages.{recipe.stage}")
    less, last = ({key: sizes.setting(key) for key in getattr(stage, name, ())} for name in ("LESS", "LAST"))
    return fits(needed, lambda settings: estimate(sizes.given(less | last | settings), recipe), less, last)


def brackets(fits: Fits) -> str:
    """As in "[48, 80; 24: trainer.micro_batch_tokens=1024]"."""
    as_it_is = ", ".join(str(gpu) for gpu, settings in fits.items() if settings == {})
    helped = [f"{gpu}: {written(settings)}" for gpu, settings in fits.items() if settings]
    return "[" + "; ".join([as_it_is or "none", *helped]) + "]"


def written(settings: dict[str, Any]) -> str:
    """As one types them."""
    return " ".join(f"{key}={str(value).lower()}" for key, value in settings.items())


def lines(plan: list[Planned]) -> list[str]:
    """One line an artifact: state, name, estimate, inputs."""
    provisional = {planned.recipe.address: planned.provisional for planned in plan}
    rows = []
    for one in plan:
        state, cost = "exists", size(one.estimate.disk) + " disk"
        if not one.exists:
            state = "would be built"
            memory = f"{size(one.estimate.memory)} memory" + (f" {brackets(one.fits)}" if one.fits else "")
            cost = f"{took(one.estimate.seconds, one.estimate.elsewhere)}, {memory}, {cost}"
        if one.price:
            cost += f", recovery ~{flops(one.price.student, one.price.teacher)} FLOPs"
        inputs = [named(recipe, provisional[recipe.address]) for recipe in one.recipe.inputs.values()]
        rows.append(f"{state:<15} {one.name:<27} {cost}" + (f"  <- {', '.join(inputs)}" if inputs else ""))
    return rows


def took(seconds: float, elsewhere: bool) -> str:
    """What is known of the time: a server's is the server's."""
    return " + ".join([*([f"~{duration(seconds)}"] if seconds else []), *(["a server's time"] if elsewhere else [])])


def summary(records: list[dict[str, Any]]) -> str:
    """One line about what is still to be built; artifacts that several jobs share are counted once."""
    unique = {record["artifact"]: record for record in records if not record["exists"]}
    seconds = sum(record["seconds"] for record in unique.values())
    disk = sum(record["disk"] for record in unique.values())
    memory = max((record["memory"] for record in unique.values()), default=0.0)
    served = " and what servers take" if any(record["elsewhere"] for record in unique.values()) else ""
    return (
        f"{len(unique)} artifacts to build: about {duration(seconds)}{served}, at most {size(memory)} memory, "
        f"{size(disk)} disk"
    )


def by_way(jobs: Iterable[tuple[str, list[dict[str, Any]]]]) -> list[str]:
    """A line for the recoveries of each price, cheapest first; of each job the option of `finetune` and its plan.

    Of an option whose jobs have several prices, from the cheapest to the dearest.
    """
    prices: dict[str, list[Price]] = {}
    for way, plan in jobs:
        if paid := [Price(**record["price"]) for record in plan if "price" in record]:
            prices.setdefault(way, []).append(sum(paid, Price()))
    ways: dict[str, list[str]] = {}
    for way, own in sorted(prices.items(), key=lambda one: min(price.total for price in one[1])):
        cheapest, dearest = (chosen(own, key=lambda price: price.total) for chosen in (min, max))
        texts = dict.fromkeys(flops(price.student, price.teacher) for price in (cheapest, dearest))
        ways.setdefault(" to ".join(texts), []).append(way)
    return [f"recovery by finetune={','.join(names)}: about {text} FLOPs" for text, names in ways.items()]


PRICED = (
    "a recovery's price is FLOPs of the student + of the unpruned model, as a report counts them; what is yet to be "
    "written counts as long as the dataset's answers"
)


def by_gpu(records: list[dict[str, Any]]) -> list[str]:
    """A line a GPU: the stages that do not fit in it as they are, and what the largest of each takes to do so."""
    largest: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: record["memory"]):
        if record.get("fits"):
            largest[record["artifact"].split("/")[0]] = record
    found = []
    for gpu in GPUS if largest else ():
        asked = {stage: one["fits"][str(gpu)] for stage, one in largest.items()}
        with_settings = [f"{stage} with {written(one)}" for stage, one in asked.items() if one]
        never = [f"{stage} does not" for stage, one in asked.items() if one is None]
        rest = "all" if not with_settings and not never else "the rest"
        found.append(f"in {gpu} GB: {', '.join([*with_settings, *never, f'{rest} as it is'])}")
    return found


def assumption(accelerator: str) -> str:
    device = DEVICES[accelerator]
    in_brackets = "; in brackets the GPUs, by GB, that it fits in, and the settings that would fit others"
    return (
        f"estimates are for {device.name} (trainer.accelerator={accelerator}; {device.flops[2]:.0e} FLOP/s sustained "
        f"in 16 bits) and rough: within a factor of 3{in_brackets if accelerator == 'gpu' else ''}"
    )
