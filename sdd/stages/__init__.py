"""Stages: each turns a recipe and the folders of its inputs into an artifact. `builds` is the store's table of them."""

import gc
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path

from sdd.stages.runtime import Runtime
from sdd.store import Build, Recipe

_STAGES = {
    "scores": ("cut", False),
    "pruned": ("cut", False),
    "rewrites": ("rows", True),
    "targets": ("rows", False),
    "tuned": ("tuned", True),
    "merged": ("merged", False),
    "evaluated": ("evaluated", True),
    "answered": ("answered", True),
    "surprisals": ("shifted", False),
    "drafted": ("drafted", False),
    "shifted": ("shifted", False),
    "measured": ("measured", False),
}
"""Stage -> (module, whether it continues from partial work)."""


def _release() -> None:
    """Let go of what a stage opened: adapters and trainers hold models in circles, which outlive it otherwise."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def builds(runtime: Runtime) -> dict[str, Build]:
    """How every stage is built on this machine; a stage's module is imported when it is needed."""

    def lazily(stage: str, module: str) -> Callable[[Recipe, Mapping[str, Path], Path], None]:
        def function(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
            found = getattr(import_module(f"sdd.stages.{module}"), f"build_{stage}")
            try:
                partial(found, runtime)(recipe, inputs, folder)
            finally:
                _release()

        return function

    return {stage: Build(lazily(stage, module), resumable) for stage, (module, resumable) in _STAGES.items()}
