"""Open what an artifact holds as one stock model: a pruned checkpoint, or a base with its adapter merged in."""

from pathlib import Path
from typing import Any

from sdd import models
from sdd.stages.runtime import Runtime
from sdd.store import read_manifest


def base_folder(tuned: Path, runtime: Runtime) -> Path:
    """The checkpoint that a tuned student's adapter belongs to."""
    manifest = read_manifest(tuned)
    if "pruned" in manifest["inputs"]:
        return tuned.parent.parent / "pruned" / str(manifest["inputs"]["pruned"])
    return runtime.source(manifest["spec"]["model"], "model")


def open_student(folder: Path, runtime: Runtime, dtype: str) -> tuple[Any, Path]:
    """The model of an artifact in `dtype`, adapter merged, and the folder of its tokenizer.

    The adapter is merged in float32 before any cast, so that a small update is not rounded away twice.
    """
    if not (folder / "adapter").is_dir():
        return models.load_model(folder, dtype, runtime.device, runtime.attention), folder
    import torch
    from peft import PeftModel

    base = base_folder(folder, runtime)
    model = models.load_model(base, "float32", runtime.device, runtime.attention)
    merged = PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    return merged.to(getattr(torch, dtype)).eval(), base
