"""Merge students of one base checkpoint tensor by tensor: the base is read once, each student as what it adds to it.

Arithmetic is float32, the result is stored in the dtype of the base's tensor or in a wider one. What no student changes
is copied byte for byte, or widened exactly; tied embeddings are written once. Held in memory are a few times the
largest tensor. Knows nothing of how students were made, nor of the store.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sdd.architectures import BLOCK_NAME, HEADS
from sdd.merging.formulas import angle, linear, norm, share_at, slerp, task_arithmetic, ties
from sdd.merging.students import Student
from sdd.models.checkpoints import Checkpoint
from sdd.models.files import BYTES, CODES, Header, is_narrower, read_header
from sdd.pruning.depth import write_header
from sdd.store.hashed import HashedFile

if TYPE_CHECKING:
    from torch import Tensor


# ---- one tensor -----------------------------------------------------------------------------------------------------


def merge_tensor(
    base: Tensor, contributions: list[tuple[Tensor, Tensor] | None], method: dict[str, Any], t: float
) -> tuple[Tensor, dict[str, Any]]:
    """The merged tensor in float32, and what was measured: norms, and angles (radians) of every pair.

    `contributions` is what each student gives: its tensor and its task vector, float32, shaped as `base`; None for no
    change.
    """
    float_base = base.float()
    students = [float_base if pair is None else pair[0] for pair in contributions]
    vectors = [float_base.new_zeros(float_base.shape) if pair is None else pair[1] for pair in contributions]
    norms = [norm(student) for student in students]
    vector_norms = [norm(vector) for vector in vectors]
    pairs = list(itertools.combinations(range(len(vectors)), 2))
    distances = {(i, j): norm(vectors[i] - vectors[j]) for i, j in pairs}  # the distance of the students themselves too
    measured: dict[str, Any] = {
        "angles": [angle(norms[i], norms[j], distances[i, j]) for i, j in pairs],
        "task_vector_angles": [angle(vector_norms[i], vector_norms[j], distances[i, j]) for i, j in pairs],
        "norms": norms,
        "task_vector_norms": vector_norms,
    }
    match method["method"]:
        case "slerp" if method["space"] == "weights":
            merged = slerp(students[0], students[1], t, measured["angles"][0])
        case "slerp":
            merged = float_base + slerp(vectors[0], vectors[1], t, measured["task_vector_angles"][0])
        case "linear":
            merged = linear(students, method["weights"])
        case "task_arithmetic":
            merged = task_arithmetic(float_base, vectors, method["weights"])
        case "ties":
            merged = ties(float_base, vectors, method["weights"], method["density"])
        case other:
            raise AssertionError(f"no method {other}")
    return merged, measured


# ---- whole checkpoints ----------------------------------------------------------------------------------------------


def place_of(tensor: str, num_blocks: int) -> float:
    """Where a tensor stands, from 0 (embeddings, first block) to 1 (last block, final norm, head)."""
    match = BLOCK_NAME.match(tensor)
    if match:
        return int(match["index"]) / max(1, num_blocks - 1)
    return 0.0 if "embed" in tensor and tensor not in HEADS else 1.0


def merge_checkpoints(
    base: Checkpoint,
    students: list[Student],
    method: dict[str, Any],
    target: Path,
    dtype: str | None = None,
    shown: bool = True,
) -> dict[str, Any]:
    """Write the merged checkpoint into the folder `target`, in files cut as those of `base`.

    `method` holds `method` and its settings, as the stage's spec writes them. Tensors that are narrower than `dtype`
    are stored in it; None keeps the base's dtypes. Returns `tensors` (name -> what was measured, see `merge_tensor`)
    and `copied`, the names of those that no student changes.
    """
    config, shards = base.config, base.weight_files
    tied = HEADS if config.get("tie_word_embeddings", False) else ()
    headers = [_header(shard, tied) for shard in shards]
    names = {name for entries, _, _ in headers for name in entries}
    for student in students:
        student.check(names)
    facts: dict[str, Any] = {"tensors": {}, "copied": []}
    total, weight_map = 0, dict[str, str]()
    with tqdm(total=len(names), desc="merge", unit="tensor", disable=not shown) as progress:
        for shard, (entries, metadata, start) in zip(shards, headers, strict=True):
            if not entries:
                continue
            weight_map |= dict.fromkeys(entries, shard.name)
            wider = {name: dtype if is_narrower(entry["dtype"], dtype) else None for name, entry in entries.items()}
            stored = {name: _entry(entry, wider[name]) for name, entry in entries.items()}
            with shard.open("rb") as reader, HashedFile(target / shard.name) as writer:
                total += write_header(writer, metadata, stored)
                for name, tensor, measured in _merged(shard, wider, students, method, config):
                    if tensor is None:
                        begin, end = entries[name]["data_offsets"]
                        reader.seek(start + begin)
                        writer.copy(reader, end - begin)
                    else:
                        _write(tensor, writer)
                    if measured is None:
                        facts["copied"].append(name)
                    else:
                        facts["tensors"][name] = measured
                    progress.update(1)
    if shards[0].name != "model.safetensors":
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for path in [base.folder / "config.json", *base.side_files]:
        shutil.copyfile(path, target / path.name)
    if dtype:
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        config |= dict.fromkeys(keys, dtype)
        (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return facts


def _header(shard: Path, left_out: tuple[str, ...]) -> tuple[Header, dict[str, str] | None, int]:
    """(tensors in the order of their data, metadata, offset of the data) of a safetensors file."""
    with shard.open("rb") as file:
        header, start = read_header(file, shard)
    metadata = header.pop("__metadata__", None)
    kept = ((name, entry) for name, entry in header.items() if name not in left_out)
    return dict(sorted(kept, key=lambda pair: pair[1]["data_offsets"][0])), metadata, start


def _entry(entry: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A tensor's entry in the header, in `dtype` if there is one; where its bytes go is for `write_header` to say."""
    if dtype is None:
        return entry
    size = math.prod(entry["shape"]) * BYTES[CODES[dtype]]
    return {**entry, "dtype": CODES[dtype], "data_offsets": [0, size]}


def _merged(
    shard: Path,
    wider: dict[str, str | None],
    students: list[Student],
    method: dict[str, Any],
    config: dict[str, Any],
) -> Iterator[tuple[str, Tensor | None, dict[str, Any] | None]]:
    """(name, tensor to write, what was measured) for every tensor of a file.

    No tensor where the base's bytes stay as they are; nothing measured where no student changes it. `wider` maps every
    name to the dtype that it is stored in, None for the base's.
    """
    from safetensors import safe_open

    with safe_open(shard, framework="pt") as file:
        for name, dtype in wider.items():
            if dtype is None and not any(student.touches(name) for student in students):
                yield name, None, None
            else:
                t = share_at(method.get("t", 0.5), name, place_of(name, config["num_hidden_layers"]))
                yield name, *_read_and_merged(file, name, dtype, students, method, t)


def _read_and_merged(
    file: Any, name: str, dtype: str | None, students: list[Student], method: dict[str, Any], t: float
) -> tuple[Tensor | None, dict[str, Any] | None]:
    """One tensor of `_merged`; what it was made of is free when it is there."""
    import torch

    base = file.get_tensor(name)
    contributions = [student.read(name, base) for student in students]
    if not any(contributions):
        return base.to(getattr(torch, dtype)) if dtype else None, None
    merged, measured = merge_tensor(base, contributions, method, t)
    return merged.to(getattr(torch, dtype) if dtype else base.dtype), measured


def _write(tensor: Tensor, writer: HashedFile) -> None:
    import torch

    writer.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
