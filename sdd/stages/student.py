"""Open what an artifact holds as one stock model: a checkpoint, or a base with its adapter merged in."""

from pathlib import Path
from typing import Any

from sdd import models
from sdd.adapters import merged
from sdd.stages.runtime import Runtime
from sdd.store import read_manifest


def base_folder(tuned: Path, runtime: Runtime) -> Path:
    """The checkpoint that a tuned student was made from."""
    manifest = read_manifest(tuned)
    if "pruned" in manifest["inputs"]:
        return tuned.parent.parent / "pruned" / str(manifest["inputs"]["pruned"])
    return runtime.source(manifest["spec"]["model"], "model")


def open_student(folder: Path, runtime: Runtime, dtype: str) -> tuple[Any, Path]:
    """The model of an artifact in `dtype`, adapter merged, and the folder of its tokenizer.

    The adapter is merged in float32 before any cast, so that a small update is not rounded away twice; one trained on
    a base in 4 bits is merged into the base as it was before.
    """
    if (folder / "checkpoint").is_dir():
        folder = folder / "checkpoint"
    if not (folder / "adapter").is_dir():
        return models.load_model(folder, dtype, runtime.device, runtime.attention), folder
    import torch

    base = base_folder(folder, runtime)
    model = models.load_model(base, "float32", runtime.device, runtime.attention)
    return merged(model, folder / "adapter").to(getattr(torch, dtype)).eval(), base
