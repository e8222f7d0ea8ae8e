"""Merge students of one base checkpoint tensor by tensor: the base is read once, each student as what it adds to it.

Arithmetic is float32, the result is stored in the dtype of the base's tensor. What no student changes is copied byte
for byte; tied embeddings are written once. Held in memory are a few times the largest tensor. Knows nothing of how
students were made, nor of the store.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from tqdm import tqdm

from sdd.architectures import BLOCK_NAME, HEADS
from sdd.merging.formulas import angle, linear, norm, share_at, slerp, task_arithmetic, ties
from sdd.merging.students import Student
from sdd.models.checkpoints import Checkpoint
from sdd.models.files import Header, read_header
from sdd.pruning.depth import copy_bytes, write_header

if TYPE_CHECKING:
    from torch import Tensor


# ---- one tensor -----------------------------------------------------------------------------------------------------


def merge_tensor(
    base: Tensor, read: list[tuple[Tensor, Tensor] | None], method: dict[str, Any], t: float
) -> tuple[Tensor, dict[str, Any]]:
    """The merged tensor in the dtype of `base`, and what was measured: norms, and angles (radians) of every pair.

    `read` is what each student gives: its tensor and its task vector, float32, shaped as `base`; None for no change.
    """
    whole = base.float()
    students = [whole if one is None else one[0] for one in read]
    vectors = [whole.new_zeros(whole.shape) if one is None else one[1] for one in read]
    norms = [norm(student) for student in students]
    added = [norm(vector) for vector in vectors]
    pairs = list(itertools.combinations(range(len(vectors)), 2))
    apart = {(i, j): norm(vectors[i] - vectors[j]) for i, j in pairs}  # the distance of the students themselves too
    measured: dict[str, Any] = {
        "angles": [angle(norms[i], norms[j], apart[i, j]) for i, j in pairs],
        "task_vector_angles": [angle(added[i], added[j], apart[i, j]) for i, j in pairs],
        "norms": norms,
        "task_vector_norms": added,
    }
    match method["method"]:
        case "slerp" if method["space"] == "weights":
            merged = slerp(students[0], students[1], t, measured["angles"][0])
        case "slerp":
            merged = whole + slerp(vectors[0], vectors[1], t, measured["task_vector_angles"][0])
        case "linear":
            merged = linear(students, method["weights"])
        case "task_arithmetic":
            merged = task_arithmetic(whole, vectors, method["weights"])
        case "ties":
            merged = ties(whole, vectors, method["weights"], method["density"])
        case other:
            raise AssertionError(f"no method {other}")
    return merged.to(base.dtype), measured


# ---- whole checkpoints ----------------------------------------------------------------------------------------------


def place_of(tensor: str, num_blocks: int) -> float:
    """Where a tensor stands, from 0 (embeddings, first block) to 1 (last block, final norm, head)."""
    match = BLOCK_NAME.match(tensor)
    if match:
        return int(match["index"]) / max(1, num_blocks - 1)
    return 0.0 if "embed" in tensor and tensor not in HEADS else 1.0


def merge_checkpoints(
    base: Checkpoint, students: list[Student], method: dict[str, Any], target: Path
) -> dict[str, Any]:
    """Write the merged checkpoint into the folder `target`, in files cut as those of `base`.

    `method` holds `method` and its settings, as `sdd.recipes` writes them. Returns `tensors` (name -> what was
    measured, see `merge_tensor`) and `copied`, the names of those that no student changes.
    """
    config, shards = base.config, base.weight_files
    tied = HEADS if config.get("tie_word_embeddings", False) else ()
    headers = [_header(shard, tied) for shard in shards]
    names = {name for entries, _, _ in headers for name in entries}
    for student in students:
        student.check(names)
    facts: dict[str, Any] = {"tensors": {}, "copied": []}
    total, weight_map = 0, dict[str, str]()
    with tqdm(total=len(names), desc="merge", unit="tensor") as progress:
        for shard, (entries, metadata, start) in zip(shards, headers, strict=True):
            if not entries:
                continue
            weight_map |= dict.fromkeys(entries, shard.name)
            with shard.open("rb") as reader, (target / shard.name).open("wb") as writer:
                total += write_header(writer, metadata, entries)
                for name, tensor, measured in _merged(shard, list(entries), students, method, config):
                    if tensor is None:
                        begin, end = entries[name]["data_offsets"]
                        reader.seek(start + begin)
                        copy_bytes(reader, writer, end - begin)
                        facts["copied"].append(name)
                    else:
                        _write(tensor, writer)
                        facts["tensors"][name] = measured
                    progress.update(1)
    if shards[0].name != "model.safetensors":
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for path in [base.folder / "config.json", *base.side_files]:
        shutil.copyfile(path, target / path.name)
    return facts


def _header(shard: Path, left_out: tuple[str, ...]) -> tuple[Header, dict[str, str] | None, int]:
    """(tensors in the order of their data, metadata, offset of the data) of a safetensors file."""
    with shard.open("rb") as file:
        header, start = read_header(file, shard)
    metadata = header.pop("__metadata__", None)
    kept = ((name, entry) for name, entry in header.items() if name not in left_out)
    return dict(sorted(kept, key=lambda pair: pair[1]["data_offsets"][0])), metadata, start


def _merged(
    shard: Path, names: list[str], students: list[Student], method: dict[str, Any], config: dict[str, Any]
) -> Iterator[tuple[str, Tensor | None, dict[str, Any]]]:
    """(name, merged tensor, what was measured) for every tensor of a file; None where no student changes it."""
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        for name in names:
            if not any(student.touches(name) for student in students):
                yield name, None, {}
                continue
            base = file.get_tensor(name)
            read = [student.read(name, base) for student in students]
            if not any(read):
                yield name, None, {}
                continue
            t = share_at(method.get("t", 0.5), name, place_of(name, config["num_hidden_layers"]))
            yield name, *merge_tensor(base, read, method, t)


def _write(tensor: Tensor, writer: BinaryIO) -> None:
    import torch

    writer.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
