"""Remove blocks from a checkpoint by streaming its bytes: no tensor is materialised, so 8B works as on a laptop.

A safetensors file is a header (JSON: name -> dtype, shape, byte range) and the bytes. Each input shard is copied range
by range into an output shard without the removed blocks' tensors, the kept blocks renumbered without holes; per-layer
lists in the config are cut alike, so that stock `from_pretrained` opens the result. Knows nothing of scores.
"""

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from sdd.architectures import BLOCK_NAME, HEADS, STORED_BUFFERS, check_cut, cut_config, explicit_config
from sdd.errors import UserError
from sdd.models import SIDE_FILES, read_config, weight_files

CHUNK = 16 << 20
"""Bytes held at a time."""

Header = dict[str, Any]


def read_header(file: BinaryIO, path: Path) -> tuple[Header, int]:
    """The header of a safetensors file and the offset of its first data byte."""
    start = file.read(8)
    size = path.stat().st_size
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if 8 + length > size:
        raise UserError(f"{path}: damaged safetensors file (the header is cut off); fetch it again")
    try:
        header: Header = json.loads(file.read(length))
        ends = [_end(entry) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: damaged safetensors file (the header is not valid); fetch it again") from None
    if 8 + length + max(ends, default=0) > size:
        raise UserError(f"{path}: damaged safetensors file (the data are cut off); fetch it again")
    return header, 8 + length


def _end(entry: dict[str, Any]) -> int:
    begin, end = entry["data_offsets"]
    if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end and _elements(entry) >= 0):
        raise ValueError("no byte range")
    return end


def renamed(name: str, position: dict[int, int]) -> str | None:
    """The name in the pruned checkpoint, None for a tensor of a removed block; `position` maps kept blocks."""
    match = BLOCK_NAME.match(name)
    if match is None:
        return name
    block = int(match["index"])
    return f"{match['before']}{position[block]}{match['after']}" if block in position else None


def _elements(entry: dict[str, Any]) -> int:
    return math.prod(int(extent) for extent in entry["shape"])


def _copy(source: BinaryIO, target: BinaryIO, length: int) -> None:
    while length:
        data = source.read(min(CHUNK, length))
        assert data, "the file ended early after its header was checked"
        target.write(data)
        length -= len(data)


def _stream(source: Path, target: Path, position: dict[int, int]) -> tuple[dict[str, int], int]:
    """Copy one shard; returns the kept tensors' element counts by new name, and the bytes written."""
    with source.open("rb") as reader:
        header, base = read_header(reader, source)
        kept = [
            (new, entry)
            for name, entry in header.items()
            if name != "__metadata__" and (new := renamed(name, position)) is not None
        ]
        kept.sort(key=lambda pair: pair[1]["data_offsets"][0])
        if not kept:
            return {}, 0
        written: Header = {"__metadata__": header.get("__metadata__", {"format": "pt"})}
        offset = 0
        for name, entry in kept:
            begin, end = entry["data_offsets"]
            written[name] = {**entry, "data_offsets": [offset, offset + end - begin]}
            offset += end - begin
        text = json.dumps(written, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with target.open("wb") as writer:
            writer.write(struct.pack("<Q", len(text)) + text)
            for _, entry in kept:
                begin, end = entry["data_offsets"]
                reader.seek(base + begin)
                _copy(reader, writer, end - begin)
    return {name: _elements(entry) for name, entry in kept}, offset


def count_parameters(folder: Path) -> int:
    """Stored parameters of a checkpoint; a tied tensor counts once, constants stored beside them do not."""
    left_out = HEADS if read_config(folder).get("tie_word_embeddings", False) else ()
    found = (pair for pair in _all_elements(folder) if not STORED_BUFFERS.search(pair[0]))
    return sum(elements for name, elements in found if name not in left_out)


def _all_elements(folder: Path) -> Iterator[tuple[str, int]]:
    for path in weight_files(folder):
        with path.open("rb") as file:
            header, _ = read_header(file, path)
        yield from ((name, _elements(entry)) for name, entry in header.items() if name != "__metadata__")


def matrices(folder: Path) -> set[str]:
    """The names of a checkpoint's modules with a two-dimensional weight; experts, which stock code stacks, left out."""
    found = set()
    for path in weight_files(folder):
        with path.open("rb") as file:
            header, _ = read_header(file, path)
        found |= {name for name, entry in header.items() if name != "__metadata__" and len(entry["shape"]) == 2}
    return {name.removesuffix(".weight") for name in found if name.endswith(".weight") and ".experts." not in name}


def prune_checkpoint(source: Path, target: Path, removed: list[int]) -> dict[str, Any]:
    """Write the checkpoint without the blocks `removed` (0-based) into the folder `target`.

    Returns kept and removed blocks, parameters before and after (tied weights once), and the share of FLOPs saved as
    arXiv 2410.09982 counts it: removed parameters / all parameters.
    """
    config, gone = check_prunable(source, removed), set(removed)
    kept = [block for block in range(config["num_hidden_layers"]) if block not in gone]
    position = {block: index for index, block in enumerate(kept)}
    shards = weight_files(source)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for shard in tqdm(shards, desc="prune", unit="file"):
        counts, size = _stream(shard, target / shard.name, position)
        weight_map |= dict.fromkeys(counts, shard.name)
        total_bytes += size
    if shards[0].name != "model.safetensors":
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    (target / "config.json").write_text(json.dumps(cut_config(config, kept), indent=2, sort_keys=True) + "\n")
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    before, after = count_parameters(source), count_parameters(target)
    return {
        "removed_blocks": sorted(gone),
        "kept_blocks": kept,
        "parameters_before": before,
        "parameters_after": after,
        "flops_saved": (before - after) / before,
    }


def check_prunable(folder: Path, removed: list[int]) -> dict[str, Any]:
    """The checkpoint's config, explicit of every block; a user's mistake where stock code could not open the cut."""
    where = f"model.path={folder}"
    config = read_config(folder)
    check_names(folder)
    config = explicit_config(config, where)
    kept = [block for block in range(config["num_hidden_layers"]) if block not in removed]
    assert kept, "all blocks removed; the caller checks this"
    check_cut(config, kept, where)
    return config


def check_names(folder: Path) -> None:
    """Refuse a checkpoint whose blocks are not stored one by one under their numbers; reads headers only."""
    blocks = read_config(folder)["num_hidden_layers"]
    found = {int(match["index"]) for name, _ in _all_elements(folder) if (match := BLOCK_NAME.match(name))}
    if found != set(range(blocks)):
        raise UserError(
            f"model.path={folder}: its blocks are not stored as layers.0 to layers.{blocks - 1}; not supported"
        )
