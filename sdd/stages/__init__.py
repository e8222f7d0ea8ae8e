"""Stages, a file each: its typed spec, its recipe in a study, an estimate, and how it is built.

`builder` is what the store calls; `sdd.store.stages` is the table of what they are.
"""

import gc
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from sdd.stages.runtime import Runtime
from sdd.store import Builder, Recipe

MOST_LEFT = 64 << 20
"""Bytes by which a process may grow before what its stages left is looked for: that takes as long as a small stage."""

_settled = 0
"""Bytes of this process in memory when it was looked for last."""


def _resident() -> int | None:
    """Bytes of this process in memory; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _release() -> None:
    """Let go of what a stage opened: adapters and trainers hold models in circles, which outlive it otherwise."""
    global _settled
    torch, resident = sys.modules.get("torch"), _resident()
    on_gpu = torch is not None and torch.cuda.is_available()
    if on_gpu or resident is None or resident > _settled + MOST_LEFT:
        gc.collect()
        _settled = _resident() or 0
    if torch is not None and on_gpu:
        torch.cuda.empty_cache()


def builder(runtime: Runtime) -> Builder:
    """How stages are built on this machine; a stage's module is imported when it is needed."""

    def build(recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
        try:
            import_module(f"sdd.stages.{recipe.stage}").build(runtime, recipe, inputs, folder)
        finally:
            _release()

    return build
