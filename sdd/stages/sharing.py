"""A stage that is built by several processes of this machine, a device each (`trainer.devices`)."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from sdd.config import own
from sdd.forward import ranks
from sdd.stages.runtime import Runtime
from sdd.store import Recipe

Build = Callable[[Runtime, Recipe, Mapping[str, Path], Path], None]


def shared(build: Build, runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> bool:
    """Have ranks run `build`, and wait for them; False where this process is to do it, alone or as one of them.

    A model that is spread over the devices is one process's, but in training, where ranks have the whole or a shard.
    All ranks go through it, and the first writes. The artifact's lock stays with this process.
    """
    if runtime.devices == 1 or ranks.is_rank() or (runtime.spread and recipe.stage != "tuned"):
        return False
    told = build, replace(runtime, tasks={}), recipe, dict(inputs), folder, list(own.CLASSES)
    ranks.launch(_as_rank, told, runtime.devices)
    return True


def _as_rank(
    build: Build, runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, classes: Iterable[str]
) -> None:
    for id in classes:
        own.allow(id.partition("@")[0])
    build(runtime, recipe, inputs, folder)
