"""A stage that is built by several processes, a device each: `trainer.devices` on `trainer.num_nodes` machines."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from sdd.config import own
from sdd.errors import UserError
from sdd.forward import ranks
from sdd.stages.runtime import Runtime
from sdd.store import Recipe, digest_of

SEEN = 60.0
"""Seconds that a shared file system may take to show one machine what another wrote (NFS keeps attributes as long)."""

Build = Callable[[Runtime, Recipe, Mapping[str, Path], Path], None]


def shared(build: Build, runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> bool:
    """Have ranks run `build`, and wait for them; False where this process is to do it, alone or as one of them.

    A model that is spread over the devices is one process's, but in training, where ranks have the whole or a shard.
    All ranks go through it, and the first writes. The artifact's lock stays with this process, or the first node's.
    """
    if runtime.ranks == 1 or ranks.is_rank() or (runtime.spread and recipe.stage != "tuned"):
        return False
    told = build, replace(runtime, tasks={}, nodes=None), recipe, dict(inputs), folder, list(own.CLASSES)
    if nodes := runtime.nodes:
        nodes.begin(recipe.address)  # others come here because the first has begun it
    ranks.launch(_as_rank, told, runtime.devices, nodes)
    if nodes:
        nodes.finish()
    return True


def _as_rank(
    build: Build, runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, classes: Iterable[str]
) -> None:
    for id in classes:
        own.allow(id.partition("@")[0])
    if runtime.num_nodes > 1:
        _see_the_same([folder, *inputs.values()])
    build(runtime, recipe, inputs, folder)


def _see_the_same(folders: Iterable[Path]) -> None:
    """Wait until all ranks have the same files in these folders: what each goes on from decides what it computes."""
    until = time.monotonic() + SEEN
    while True:
        late = [time.monotonic() > until, digest_of([_files(top) for top in folders])]
        seen = [json.loads(one) for one in ranks.told(json.dumps(late).encode())]
        if len({digest for _, digest in seen}) == 1:
            return
        if any(is_late for is_late, _ in seen):
            folder = next(iter(folders))
            raise UserError(
                f"{folder} does not hold the same files on every node; paths.artifacts has to be a folder that all "
                "share"
            )
        time.sleep(1.0)


def _files(top: Path) -> list[tuple[str, int]] | None:
    """Names and sizes; None where there is no such folder."""
    if not top.is_dir():
        return None
    return sorted((str(path.relative_to(top)), path.stat().st_size) for path in top.rglob("*") if path.is_file())
