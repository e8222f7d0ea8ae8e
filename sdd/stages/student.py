"""Open what an artifact holds as one stock model: a checkpoint, or a base with its adapter merged in."""

import json
from pathlib import Path
from typing import Any

from sdd.finetuning.adapters import merged
from sdd.models import checkpoints
from sdd.models.files import CODES, FLOATS, read_headers
from sdd.stages.runtime import Runtime
from sdd.store import read_manifest
from sdd.store.files import read_jsonl


def base_folder(tuned: Path, runtime: Runtime) -> Path:
    """The checkpoint that a tuned student was made from."""
    manifest = read_manifest(tuned)
    if "pruned" in manifest["inputs"]:
        return tuned.parent.parent / "pruned" / str(manifest["inputs"]["pruned"])
    return runtime.source(manifest["spec"]["model"], "model")


def checkpoint_of(folder: Path, runtime: Runtime) -> Path:
    """The checkpoint whose shape an artifact's model has, and whose tokenizer goes with it."""
    if (folder / "checkpoint").is_dir():
        return folder / "checkpoint"
    return base_folder(folder, runtime) if (folder / "adapter").is_dir() else folder


def trained_prompts(folder: Path) -> set[str]:
    """The prompts that a student, or any that it was merged from, was trained on; none for one that was not."""
    manifest = read_manifest(folder)
    root = folder.parent.parent
    if manifest["stage"] != "tuned":
        parents = [root / "tuned" / address for address in manifest["inputs"].values()]
        return set().union(*(trained_prompts(parent) for parent in parents if parent.is_dir()))
    drawn = set(json.loads((folder / "rows.json").read_text())["ids"])
    targets = root / "targets" / str(manifest["inputs"]["targets"]) / "train.jsonl"
    return {row["prompt"] for row in read_jsonl(targets) if row["id"] in drawn}


def open_student(folder: Path, runtime: Runtime, dtype: str) -> tuple[Any, Path]:
    """The model of an artifact in `dtype`, adapter merged, and the folder of its tokenizer.

    The adapter is merged on the CPU, layer by layer, and each layer is rounded once, so that a small update is not
    rounded away and the device holds the model in `dtype` alone; one trained on a base in 4 bits is merged into the
    base as it was before.
    """
    base = checkpoint_of(folder, runtime)
    if not (folder / "adapter").is_dir():
        return checkpoints.load_model(base, dtype, runtime.device, runtime.attention), base
    model = checkpoints.load_model(base, stored_dtype(base), attention=runtime.attention)
    return merged(model, folder / "adapter", dtype).to(runtime.device).eval(), base


def stored_dtype(folder: Path) -> str:
    """The dtype of a checkpoint's weights that all of them fit in without rounding; float32 where there are several."""
    codes = stored_codes(folder) & FLOATS
    return next((dtype for dtype, code in CODES.items() if codes == {code}), "float32")


def stored_codes(folder: Path) -> set[str]:
    """The dtypes of a checkpoint's tensors, as headers name them."""
    return {entry["dtype"] for entry in read_headers(checkpoints.weight_files(folder)).values()}
