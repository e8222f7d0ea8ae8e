"""Look into a folder of artifacts.

python -m sdd.store --artifacts artifacts list
python -m sdd.store verify [--delete]      # files and manifests against their recorded digests; deletes what is damaged
python -m sdd.store explain A B            # why two addresses differ
python -m sdd.store prune [--yes]          # what no result needs; deletes only with --yes
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.store.stages import STAGES
from sdd.store.store import MANIFEST, Store, files_of, is_place
from sdd.untrusted import printable

MOST_COMPARED = 1_000
"""Pairs of artifacts that are compared; a merge of a dozen students takes about a hundred."""
DEEPEST = 40
"""Artifacts from one to the first of its inputs; a repaired, tuned and merged student's evaluation has seven."""


def differences(
    store: Store, one: str, other: str, where: str = "", compared: Iterator[int] | None = None, depth: int = 0
) -> Iterator[dict[str, Any]]:
    """Every setting in which two recipes differ, followed upstream through their inputs."""
    if one == other:
        return
    compared = compared or iter(range(MOST_COMPARED))
    if next(compared, None) is None or depth > DEEPEST:
        raise UserError("inputs without an end: these manifests were not written by a store")
    a, b = store.manifest(store.find(one)), store.manifest(store.find(other))
    if a["stage"] != b["stage"]:
        yield {"where": where + "stage", "a": a["stage"], "b": b["stage"]}
        return
    prefix = f"{where}{a['stage']}."
    made_over = [a["inputs"].get(a["stage"]), b["inputs"].get(b["stage"])]
    if (made_over[0] is None) != (made_over[1] is None):  # one is the other's like, worked on once more
        own, base = (b, a) if made_over[0] is None else (a, b)
        for key, value in sorted(flat(own["spec"]).items()):
            if value != flat(base["spec"]).get(key):
                yield {"where": prefix + key, "a": None if own is b else value, "b": value if own is b else None}
        yield from differences(store, made_over[0] or one, made_over[1] or other, where, compared, depth + 1)
        return
    if a["version"] != b["version"]:
        yield {"where": prefix + "version", "a": a["version"], "b": b["version"]}
    left, right = flat(a["spec"]), flat(b["spec"])
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            yield {"where": prefix + key, "a": left.get(key), "b": right.get(key)}
    for name in sorted(a["inputs"].keys() | b["inputs"].keys()):
        x, y = a["inputs"].get(name), b["inputs"].get(name)
        if x is None or y is None:
            yield {"where": f"{prefix}{name}", "a": x, "b": y}
        else:
            several = "" if a["stage"] != "merged" else f"{name}."  # inputs of one stage, told apart by name
            yield from differences(store, x, y, prefix + several, compared, depth + 1)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects by their dotted names."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, child in value.items()
        for key, leaf in flat(child, f"{prefix}.{name}" if prefix else name).items()
    }


def unneeded(store: Store) -> list[Path]:
    """Complete artifacts that no result (evaluated, drafted, ...) stands on."""
    manifests = {manifest["address"]: manifest for manifest in store.manifests()}
    needed: set[str] = set()
    queue = [address for address, manifest in manifests.items() if STAGES[manifest["stage"]].is_result]
    while queue:
        address = queue.pop()
        if address not in needed:
            needed.add(address)
            queue.extend(manifests.get(address, {"inputs": {}})["inputs"].values())
    return [folder for folder in store.folders() if folder.name not in needed]


def made_from(store: Store, damaged: Collection[Path]) -> dict[Path, list[str]]:
    """What was made from damaged artifacts, or from what was: whole ones, inputs first, with those of their inputs.

    A manifest has its inputs' addresses, not their bytes: whether the damage came before or after, nothing can tell.
    """
    whole = {folder.name: folder for folder in store.folders() if folder not in damaged}
    inputs = {address: store.manifest(folder)["inputs"].values() for address, folder in whole.items()}
    doubtful = {folder.name: folder for folder in damaged}
    made: dict[Path, list[str]] = {}
    for address in TopologicalSorter(inputs).static_order():
        if address in whole and (upstream := [one for one in inputs[address] if one in doubtful]):
            doubtful[address] = whole[address]
            made[whole[address]] = [_name(doubtful[one]) for one in upstream]
    return made


def _name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in files_of(folder))


def delete(root: Path, folder: Path) -> None:
    """Delete the artifact `<root>/<stage>/<address>`; whatever is put in its place meanwhile, nothing elsewhere."""
    if folder.parent.parent != root or not is_place(folder):
        raise UserError(f"{folder} is no artifact of {root}; nothing of it was deleted")
    real = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    with contextlib.ExitStack() as opened:
        try:
            stage = os.open(folder.parent, real)
            opened.callback(os.close, stage)
            own = os.open(folder.name, real, dir_fd=stage)
            opened.callback(os.close, own)
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(MANIFEST, dir_fd=own)  # first, so that what is left of an interrupted deletion is no artifact
            shutil.rmtree(folder.name, dir_fd=stage)
        except OSError as error:
            raise UserError(f"{folder} could not be deleted: {error.strerror}") from None


def verify(store: Store, to_delete: bool) -> tuple[Any, list[str], int]:
    """What is damaged, with all that is to be built again with it: what was made from it, and unfinished work.

    What is damaged goes last, so that after an interrupted deletion the rest is still known.
    """
    folders = store.folders()
    damaged = {folder: problems for folder in folders if (problems := store.verify(folder))}
    made, unfinished = (made_from(store, damaged), store.partials()) if damaged else ({}, [])
    if to_delete:
        if held := [_name(partial) for partial in unfinished if store.is_held(partial)]:
            raise UserError(f"nothing was deleted: end the building of {held[0]} first, perhaps from what is damaged")
        for partial in unfinished:
            delete(store.root / ".partial", partial)
        for folder in [*reversed(made), *damaged]:
            delete(store.root, folder)
    lines = [f"{_name(folder)}: {'; '.join(problems)}" for folder, problems in damaged.items()]
    lines += [f"{_name(folder)}: made from {', '.join(inputs)}" for folder, inputs in made.items()]
    lines += [f"{_name(partial)}: unfinished, perhaps made from what is damaged" for partial in unfinished]
    total = f"{len(folders)} artifacts, {len(damaged)} damaged"
    if damaged:
        remedy = "deleted; the same commands build them again" if to_delete else "delete them all: add --delete"
        total += f", {len(made)} made from these, {len(unfinished)} unfinished; {remedy}"
    data = {
        "artifacts": len(folders),
        "damaged": {_name(folder): problems for folder, problems in damaged.items()},
        "made_from_damaged": {_name(folder): inputs for folder, inputs in made.items()},
        "unfinished": [_name(partial) for partial in unfinished],
        "deleted": to_delete,
    }
    return data, [*lines, total], 1 if damaged and not to_delete else 0


def run(arguments: argparse.Namespace) -> tuple[Any, list[str], int]:
    """The answer as data, as lines, and the exit code."""
    store = Store(arguments.artifacts)
    if not store.root.is_dir():
        raise UserError(f"--artifacts {store.root}: no such folder")
    if arguments.command == "list":
        rows = [
            {key: m[key] for key in ("stage", "address", "created", "seconds", "labels", "inputs")}
            | {"bytes": _size(folder)}
            for folder, m in zip(store.folders(), store.manifests(), strict=True)
        ]
        lines = [
            f"{r['stage']:<10} {r['address']}  {r['created']}  {r['seconds']:>8.1f} s  {r['bytes']:>12,} bytes  "
            + " ".join(f"{key}={value}" for key, value in r["labels"].items())
            for r in rows
        ]
        return rows, lines, 0
    if arguments.command == "verify":
        return verify(store, arguments.delete)
    if arguments.command == "explain":
        one, other = (store.find(a).name for a in (arguments.a, arguments.b))
        changed = list(differences(store, one, other))
        lines = [f"{d['where']}: {json.dumps(d['a'])} | {json.dumps(d['b'])}" for d in changed]
        return changed, lines or ["the same recipe"], 0
    folders = unneeded(store)
    rows = [{"stage": f.parent.name, "address": f.name, "bytes": _size(f)} for f in folders]
    if arguments.yes:
        for folder in folders:
            delete(store.root, folder)
    verb = "deleted" if arguments.yes else "would delete"
    lines = [f"{verb} {row['stage']}/{row['address']}  {row['bytes']:,} bytes" for row in rows]
    total = f"{verb} {len(rows)} artifacts, {sum(row['bytes'] for row in rows):,} bytes"
    return {"deleted": arguments.yes, "artifacts": rows}, [*lines, total + ("" if arguments.yes else "; add --yes")], 0


def main(argv: list[str] | None = None) -> int:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--artifacts", default=argparse.SUPPRESS, help="the folder of artifacts (default: artifacts)")
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    parser = argparse.ArgumentParser(prog="python -m sdd.store", description="Look into a folder of artifacts.")
    parser.add_argument("--artifacts", default="artifacts", help="the folder of artifacts (default: artifacts)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", parents=[common], help="every complete artifact")
    verified = commands.add_parser("verify", parents=[common], help="files against their digests")
    verified.add_argument(
        "--delete", action="store_true", help="delete what is damaged, all that was made from it, and unfinished work"
    )
    explain = commands.add_parser("explain", parents=[common], help="why two addresses differ")
    explain.add_argument("a")
    explain.add_argument("b")
    prune = commands.add_parser("prune", parents=[common], help="delete what no result needs")
    prune.add_argument("--yes", action="store_true", help="really delete")
    arguments = parser.parse_args(argv)
    try:
        data, lines, code = run(arguments)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    print(json.dumps(data, indent=1) if arguments.json else "\n".join(map(printable, lines)))
    return code


if __name__ == "__main__":
    sys.exit(main())
