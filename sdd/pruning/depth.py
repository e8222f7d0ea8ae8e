"""Make a checkpoint smaller by streaming its bytes: no tensor is materialised, so 8B works as on a laptop.

A safetensors file is a header (JSON: name -> dtype, shape, byte range) and the bytes. Each input shard is copied range
by range into an output shard without the removed blocks' tensors, the kept blocks renumbered without holes; per-layer
lists in the config are cut alike, so that stock `from_pretrained` opens the result. Where `width` keeps rows or columns
of a tensor, it goes the same way. Knows nothing of scores.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.architectures import BLOCK_NAME, check_cut, cut_config, explicit_config
from sdd.errors import UserError
from sdd.models.checkpoints import Checkpoint
from sdd.models.files import Header, read_header
from sdd.store.hashed import CHUNK, HashedFile


def renamed(name: str, position: dict[int, int]) -> str | None:
    """The name in the pruned checkpoint, None for a tensor of a removed block; `position` maps kept blocks."""
    match = BLOCK_NAME.match(name)
    if match is None:
        return name
    block = int(match["index"])
    return f"{match['before']}{position[block]}{match['after']}" if block in position else None


def _elements(entry: dict[str, Any]) -> int:
    return math.prod(int(extent) for extent in entry["shape"])


@dataclass(frozen=True)
class Part:
    """What of a stored tensor goes into the smaller checkpoint: `rows` or `columns` (sorted indices), or all of it."""

    name: str
    rows: list[int] | None = None
    columns: list[int] | None = None

    def shape(self, whole: list[int]) -> list[int]:
        if self.rows is not None:
            return [len(self.rows), *whole[1:]]
        return whole if self.columns is None else [whole[0], len(self.columns)]


def _copy_part(source: BufferedReader, target: HashedFile, entry: dict[str, Any], base: int, part: Part) -> None:
    """Copy the bytes of one tensor, or of what is kept of it; `base` is the file's first data byte."""
    begin, end = (base + offset for offset in entry["data_offsets"])
    source.seek(begin)
    if part.rows is None and part.columns is None:
        target.copy(source, end - begin)
    else:
        _copy_some(source, target, entry["shape"], end - begin, part)


def _copy_some(source: BufferedReader, target: HashedFile, shape: list[int], size: int, part: Part) -> None:
    """Copy the kept rows or columns of a tensor of `size` bytes that begins here, some rows at a time."""
    import numpy as np

    rows = shape[0]
    width = size // (rows if part.columns is None else rows * shape[1])
    kept = np.array(part.rows if part.columns is None else part.columns)
    step = max(1, CHUNK // (size // rows))
    for row in range(0, rows, step):
        data = source.read(min(step, rows - row) * (size // rows))
        table = np.frombuffer(data, dtype=f"V{width}").reshape(min(step, rows - row), -1)
        if part.columns is None:
            first, last = np.searchsorted(kept, [row, row + step])
            some = table.take(kept[first:last] - row, axis=0)
        else:
            some = table.take(kept, axis=1)
        target.write(some.view(np.uint8))


def write_header(file: HashedFile, metadata: dict[str, str] | None, entries: Header) -> int:
    """Begin a safetensors file whose tensors follow in the order of `entries`; returns the bytes of their data."""
    dumps = json.JSONEncoder(separators=(",", ":")).encode
    texts, offset = [f'"__metadata__":{dumps({"format": "pt"} if metadata is None else metadata)}'], 0
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        texts.append(f"{dumps(name)}:{dumps({**entry, 'data_offsets': [offset, offset + end - begin]})}")
        offset += end - begin
    text = f"{{{','.join(texts)}}}".encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    return offset


Change = Callable[[str], Part | None]
"""From a stored tensor's name to what is kept of it; None where nothing is."""


def _stream(source: Path, target: Path, change: Change) -> tuple[list[str], int]:
    """Copy one shard; returns the kept tensors' new names, and the bytes written."""
    with source.open("rb") as reader:
        header, base = read_header(reader, source)
        kept = [
            (part, entry)
            for name, entry in header.items()
            if name != "__metadata__" and (part := change(name)) is not None
        ]
        kept.sort(key=lambda pair: pair[1]["data_offsets"][0])
        if not kept:
            return [], 0
        metadata = header.get("__metadata__")
        del header  # of large checkpoints it is megabytes
        entries: Header = {}
        for part, entry in kept:
            begin, end = entry["data_offsets"]
            shape = part.shape(entry["shape"])
            size = (end - begin) * math.prod(shape) // max(1, _elements(entry))
            entries[part.name] = {"dtype": entry["dtype"], "shape": shape, "data_offsets": [0, size]}
        with HashedFile(target) as writer:
            num_bytes = write_header(writer, metadata, entries)
            del entries
            for part, entry in kept:
                _copy_part(reader, writer, entry, base, part)
    return [part.name for part, _ in kept], num_bytes


def write_checkpoint(source: Checkpoint, target: Path, change: Change, config: dict[str, Any]) -> None:
    """Stream a checkpoint into the folder `target`, shard by shard, with another config."""
    shards = source.weight_files
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for shard in tqdm(shards, desc="prune", unit="file"):
        names, size = _stream(shard, target / shard.name, change)
        weight_map |= dict.fromkeys(names, shard.name)
        total_bytes += size
    if shards[0].name != "model.safetensors":
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in source.side_files:
        shutil.copyfile(path, target / path.name)


def prune_checkpoint(source: Checkpoint, target: Path, removed: list[int]) -> dict[str, Any]:
    """Write the checkpoint without the blocks `removed` (0-based) into the folder `target`.

    Returns kept and removed blocks, parameters before and after (tied weights once), and the share of FLOPs saved as
    arXiv 2410.09982 counts it: removed parameters / all parameters.
    """
    config, removed_blocks = check_prunable(source, removed), set(removed)
    kept = [block for block in range(config["num_hidden_layers"]) if block not in removed_blocks]
    position = {block: index for index, block in enumerate(kept)}

    def change(name: str) -> Part | None:
        new_name = renamed(name, position)
        return None if new_name is None else Part(new_name)

    write_checkpoint(source, target, change, cut_config(config, kept))
    before, after = source.num_parameters, Checkpoint(target).num_parameters
    return {
        "removed_blocks": sorted(removed_blocks),
        "kept_blocks": kept,
        "parameters_before": before,
        "parameters_after": after,
        "flops_saved": (before - after) / before,
    }


def check_prunable(checkpoint: Checkpoint, removed: list[int]) -> dict[str, Any]:
    """The checkpoint's config, explicit of every block; a user's mistake where stock code could not open the cut."""
    config = checkpoint.config
    check_names(checkpoint)
    config = explicit_config(config, checkpoint.where)
    kept = [block for block in range(config["num_hidden_layers"]) if block not in removed]
    assert kept, "all blocks removed; the caller checks this"
    check_cut(config, kept, checkpoint.where, checkpoint.shapes)
    return config


def check_names(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose blocks are not stored one by one under their numbers; reads headers only."""
    blocks = checkpoint.num_blocks
    if checkpoint.block_tensors.keys() != set(range(blocks)):
        raise UserError(
            f"{checkpoint.where}: its blocks are not stored as layers.0 to layers.{blocks - 1}; not supported"
        )
