"""Open what an artifact holds as one stock model: a checkpoint, or a base with its adapter merged in."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdd.finetuning.adapters import merged
from sdd.merging.streaming import merge_checkpoints
from sdd.merging.students import open_students
from sdd.models.chats import task_text
from sdd.models.checkpoints import Checkpoint, save_model
from sdd.stages.runtime import Runtime
from sdd.store import SCRATCH, read_manifest
from sdd.store.files import read_jsonl


def base_of(tuned: Path, runtime: Runtime) -> Checkpoint:
    """The checkpoint that a tuned student was made from."""
    manifest = read_manifest(tuned)
    if "pruned" in manifest["inputs"]:
        return Checkpoint(tuned.parent.parent / "pruned" / str(manifest["inputs"]["pruned"]))
    return runtime.checkpoint(manifest["spec"]["model"])


def cut_of(folder: Path) -> Path | None:
    """The pruned artifact that a pruned or tuned one is, or was tuned from; None where nothing was cut."""
    manifest = read_manifest(folder)
    if manifest["stage"] == "pruned":
        return folder
    address = manifest["inputs"].get("pruned")
    return None if address is None else folder.parent.parent / "pruned" / str(address)


@contextmanager
def to_cut(
    inputs: Mapping[str, Path], model: str | None, stored: str | None, runtime: Runtime, folder: Path
) -> Iterator[Checkpoint]:
    """What is scored or cut: the model with a digest, or the input `student`, as one checkpoint while it is read.

    A student's adapter is folded into its base, tensors narrower than `stored` widened to it, in the scratch folder of
    `folder`, where it is gone afterwards.
    """
    if "student" not in inputs:
        yield runtime.checkpoint(str(model))
        return
    student = inputs["student"]
    if not (student / "adapter").is_dir():
        yield checkpoint_of(student, runtime)
        return
    place, alone = folder / SCRATCH / "folded", {"method": "linear", "weights": [1.0]}
    shutil.rmtree(place, ignore_errors=True)  # of a killed one
    place.mkdir(parents=True)
    try:
        merge_checkpoints(base_of(student, runtime), open_students([student]), alone, place, stored)
        yield Checkpoint(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def checkpoint_of(folder: Path, runtime: Runtime) -> Checkpoint:
    """The checkpoint whose shape an artifact's model has, and whose tokenizer goes with it."""
    if (folder / "checkpoint").is_dir():
        return Checkpoint(folder / "checkpoint")
    return base_of(folder, runtime) if (folder / "adapter").is_dir() else Checkpoint(folder)


def trained_prompts(folder: Path) -> set[str]:
    """The prompts that a student, or any that it was merged or cut from, was trained on; none for one that was not."""
    manifest = read_manifest(folder)
    root = folder.parent.parent
    if manifest["stage"] != "tuned":
        parents = [root / "tuned" / address for address in manifest["inputs"].values()]
        return set().union(*(trained_prompts(parent) for parent in parents if parent.is_dir()))
    cut = cut_of(folder)
    earlier = trained_prompts(cut) if cut is not None else set()
    drawn = set(json.loads((folder / "rows.json").read_text())["ids"])
    targets = root / "targets" / str(manifest["inputs"]["targets"]) / "train.jsonl"
    rows = (row for row in read_jsonl(targets) if row["id"] in drawn)
    return earlier | {task_text(row["prompt"], row.get("before", ())) for row in rows}


def open_student(folder: Path, runtime: Runtime, dtype: str) -> tuple[Any, Checkpoint]:
    """The model of an artifact in `dtype`, adapter merged, and the checkpoint of its tokenizer.

    The adapter is merged on the CPU, layer by layer, and each layer is rounded once, so that a small update is not
    rounded away and the device holds the model in `dtype` alone; one trained on a base in 4 bits is merged into the
    base as it was before.
    """
    base = checkpoint_of(folder, runtime)
    if not (folder / "adapter").is_dir():
        return base.model(dtype, runtime.placed, runtime.attention), base
    model = base.model(base.stored_dtype, attention=runtime.attention)
    model = merged(model, folder / "adapter", dtype).eval()
    return runtime.spread.place(model) if runtime.spread else model.to(runtime.device), base


def stock_checkpoint(folder: Path, runtime: Runtime, dtype: str, target: Path) -> Path:
    """The folder of a whole checkpoint, for programs that open one themselves; an adapter's is made at `target`."""
    if not (folder / "adapter").is_dir():
        return checkpoint_of(folder, runtime).folder
    model, base = open_student(folder, replace(runtime, accelerator="cpu", spread=None), dtype)
    save_model(model, target, base)
    return target
