"""Pruning and merging on disk, side by side with a plain copy of the bytes that are kept.

    python -m benchmarks checkpoints

A random bfloat16 Llama of 0.4 GB, in one file. Three of its blocks go, or three of four of its MLPs' channels; or two
students with LoRA on the last two blocks are merged, the other blocks being copied. The digests that a manifest needs
are in the time. `cp` copies the result. The clock counts, since both wait for the disk, and hashing has a thread
beside; every turn writes new files, and removes them outside of the time. The limit is `cp` with a thread beside that
hashes what is copied: whoever writes a manifest has to know the sha256 of every byte. The results are compared with
those of loading, computing and saving tensors; memory is what Python holds at once (tracemalloc: torch's own is not in
it).
"""

import shutil
import subprocess
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.merging import make_adapter
from benchmarks.rows import Ratio, Setting
from benchmarks.timing import in_turns
from sdd.merging.streaming import merge_checkpoints
from sdd.merging.students import open_students
from sdd.models.checkpoints import Checkpoint
from sdd.pruning.depth import prune_checkpoint
from sdd.pruning.width import narrow_checkpoint
from sdd.store import file_digest
from sdd.store.hashed import taken_digest

STUDENTS = (0, 1)


@contextmanager
def made(blocks: int) -> Iterator[Checkpoint]:
    """A random bfloat16 Llama of 27 MB a block in a temporary folder, in one file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        for seed in STUDENTS:
            make_adapter(folder, folder.with_name(f"student{seed}"), seed, 0.01, [blocks - 2, blocks - 1])
        yield Checkpoint(folder)


def pruned(source: Checkpoint, target: Path) -> None:
    prune_checkpoint(source, target, [3, 4, 5])


def narrowed(source: Checkpoint, target: Path) -> None:
    narrow_checkpoint(source, target, [list(range(0, 2816, 4)) for _ in range(source.num_blocks)])


def merged(source: Checkpoint, target: Path) -> None:
    students = open_students([source.folder.with_name(f"student{seed}") for seed in STUDENTS])
    merge_checkpoints(source, students, {"method": "linear", "weights": [0.5, 0.5]}, target)


def written(way: Callable[[Checkpoint, Path], Any], source: Checkpoint, target: Path) -> dict[str, str]:
    """The digests of all that a way writes into a new folder."""
    target.mkdir()
    way(source, target)
    return {path.name: taken_digest(path) for path in sorted(target.iterdir())}


def expected(way: str, source: Checkpoint) -> dict[str, Any]:
    """The tensors that the result has to hold, by loading and slicing."""
    from safetensors.torch import load_file

    tensors = load_file(source.folder / "model.safetensors")
    if way == "two students":
        return tensors | averaged(source, tensors)
    if way == "narrower MLPs":
        kept = list(range(0, 2816, 4))
        cuts = {"gate_proj": lambda t: t[kept], "up_proj": lambda t: t[kept], "down_proj": lambda t: t[:, kept]}
        names = {name: next((cut for key, cut in cuts.items() if key in name), None) for name in tensors}
        return {name: cut(tensors[name]) if cut else tensors[name] for name, cut in names.items()}
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) in (3, 4, 5):
            continue
        if parts[1] == "layers" and int(parts[2]) > 5:
            parts[2] = str(int(parts[2]) - 3)
        found[".".join(parts)] = tensor
    return found


def averaged(source: Checkpoint, tensors: dict[str, Any]) -> dict[str, Any]:
    """The mean of both students' weights, computed in float32, where an adapter is (rank 16, alpha 32)."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for seed in STUDENTS:
        adapter = load_file(source.folder.with_name(f"student{seed}") / "adapter" / "adapter_model.safetensors")
        for name, wide in adapter.items():
            if ".lora_B." in name:
                change = 2.0 * wide.float() @ adapter[name.replace(".lora_B.", ".lora_A.")].float()
                own = name.removeprefix("base_model.model.").replace(".lora_B.", ".")
                found[own] = found.get(own, tensors[own].float()) + change / len(STUDENTS)
    return {name: tensor.bfloat16() for name, tensor in found.items()}


WAYS: dict[str, Callable[[Checkpoint, Path], Any]]
WAYS = {"fewer blocks": pruned, "narrower MLPs": narrowed, "two students": merged}


def is_equal(way: str, source: Checkpoint, folder: Path, digests: dict[str, str]) -> bool:
    from safetensors.torch import load_file

    own, other = load_file(folder / "model.safetensors"), expected(way, source)
    same = own.keys() == other.keys() and all(own[name].allclose(other[name], rtol=2**-7, atol=0) for name in own)
    return same and digests == {path.name: file_digest(path) for path in folder.iterdir()}


def peak(way: Callable[[Checkpoint, Path], Any], source: Checkpoint, target: Path) -> float:
    """Megabytes that Python holds at once while it writes."""
    tracemalloc.start()
    written(way, source, target)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shutil.rmtree(target)
    return held / 1e6


def compared(name: str, source: Checkpoint, turns: int) -> Ratio:
    way, place, numbers = WAYS[name], source.folder.parent, count()
    kept = place / "kept"
    digests = written(way, source, kept)
    equal = is_equal(name, source, kept, digests)

    def copied(target: Path) -> None:
        subprocess.run(["cp", "-r", str(kept), str(target)], check=True)

    def hashed(target: Path) -> None:
        with ThreadPoolExecutor(1) as beside:
            digests = [beside.submit(file_digest, path) for path in kept.iterdir()]
            copied(target)
            assert all(digest.result() for digest in digests)

    def taken(into: Callable[[Path], Any]) -> tuple[float, None]:
        for old in place.glob("new-*"):
            shutil.rmtree(old)
        target, started = place / f"new-{next(numbers)}", time.perf_counter()
        into(target)
        return time.perf_counter() - started, None

    ways: dict[str, Callable[[Path], Any]]
    ways = {"cp": copied, "sdd": partial(written, way, source), "limit": hashed}
    timed = {name: partial(taken, into) for name, into in ways.items()}
    in_turns(timed, 1)  # warms the cache of pages
    spent, _ = in_turns(timed, turns)
    held = peak(way, source, place / f"new-{next(numbers)}")
    parity = f"to a step of bfloat16; {held:.0f} MB held" if equal else ""
    shutil.rmtree(kept)
    what, peer = f"on disk, {name}", "cp of the result"
    return Ratio(what, peer, spent["cp"], spent["sdd"], spent["limit"], parity, goal=0.8)


def rows(setting: Setting) -> list[Ratio]:
    with made(12) as source:
        return [compared(name, source, setting.turns + 1) for name in WAYS]


def quick() -> float:
    """Seconds of `cp` over those of pruning, digests included, at best 1."""
    with made(6) as source:
        return compared("fewer blocks", source, 3).ratio
