"""Stages, a file each: its typed spec, its recipe in a study, an estimate, and how it is built.

`builder` is what the store calls; `sdd.store.stages` is the table of what they are.
"""

import gc
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from sdd.models.garbage import pass_over_modules
from sdd.stages.runtime import Runtime
from sdd.store import Builder, Recipe


def _release() -> None:
    """Let go of what a stage opened: adapters and trainers hold models in circles, which outlive it otherwise.

    Where no model is left there is nothing to look for, which would take as long as a small stage.
    """
    if (checkpoints := sys.modules.get("sdd.models.checkpoints")) is not None and checkpoints.opened:
        gc.collect()
        if not checkpoints.opened:
            pass_over_modules()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


def builder(runtime: Runtime) -> Builder:
    """How stages are built on this machine; a stage's module is imported when it is needed."""

    def build(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
        try:
            import_module(f"sdd.stages.{recipe.stage}").build(runtime, recipe, inputs, folder)
        finally:
            _release()

    return build
