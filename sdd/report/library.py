"""Artifacts on disk: manifests by address over one or more roots, and where evaluated ones are found.

An artifact is `<root>/<stage>/<address>/` with a `manifest.json` that names its inputs by address. The folder of a
sweep has one `result.json` per job that names the artifact the job asked for. Only reads; knows nothing of what the
stages mean.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.store import ANALYSES, STAGES
from sdd.store.files import AGAIN, shown_json
from sdd.untrusted import ANY

MAKING = ("command", "config", "commit", "seconds", "created")


@dataclass(frozen=True)
class Artifact:
    """One manifest and the folder it lies in."""

    path: Path
    stage: str
    address: str
    version: Any
    spec: dict[str, Any]
    inputs: dict[str, str]
    labels: dict[str, Any]
    record: dict[str, Any]
    """What the manifest says of the making: command, config, commit, seconds, created."""


ADDRESS = re.compile(r"[0-9a-f]{12,64}")
MANIFEST = {
    "stage": str,
    "address": str,
    "version?": (int, None),
    "spec?": ({str: ANY}, None),
    "inputs?": ({str: str}, None),
    "labels?": ({str: (str, None)}, None),
    "command?": (str, None),
    "config?": ({str: ANY}, None),
    "commit?": (str, None),
    "seconds?": (float, None),
    "created?": (str, None),
}


def read_artifact(path: Path) -> Artifact:
    manifest = shown_json(path / "manifest.json", MANIFEST)
    inputs = manifest.get("inputs") or {}
    if (manifest["stage"], manifest["address"]) != (path.parent.name, path.name) or manifest["stage"] not in STAGES:
        raise UserError(f"{path}/manifest.json is of another artifact; {AGAIN}")
    if not all(ADDRESS.fullmatch(address) for address in (path.name, *inputs.values())):
        raise UserError(f"{path}/manifest.json holds an address that is none; {AGAIN}")
    return Artifact(
        path=path,
        stage=manifest["stage"],
        address=manifest["address"],
        version=manifest.get("version"),
        spec=manifest.get("spec") or {},
        inputs=inputs,
        labels=manifest.get("labels") or {},
        record={name: manifest[name] for name in MAKING if manifest.get(name)},
    )


def is_artifact(folder: Path) -> bool:
    """Whether a complete artifact lies there; a link, or what lies under a linked stage, is none."""
    return (folder / "manifest.json").exists() and not folder.is_symlink() and not folder.parent.is_symlink()


def artifacts_in(root: Path, stage: str) -> list[Path]:
    """Folders of the complete artifacts of a stage."""
    return [path.parent for path in sorted((root / stage).glob("*/manifest.json")) if is_artifact(path.parent)]


class Library:
    """Artifacts by address, over one or more roots."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self.roots = list(dict.fromkeys(root.resolve() for root in roots))
        self._artifacts: dict[str, Artifact | None] = {}

    def get(self, address: str) -> Artifact | None:
        if address not in self._artifacts:
            folders = (root / stage / address for root in self.roots for stage in STAGES)
            folder = next((folder for folder in folders if ADDRESS.fullmatch(address) and is_artifact(folder)), None)
            self._artifacts[address] = read_artifact(folder) if folder else None
        return self._artifacts[address]

    def evaluated(self) -> list[Artifact]:
        return self.of_stages(["evaluated"])

    def of_stages(self, stages: Iterable[str]) -> list[Artifact]:
        stages = list(stages)
        return [read_artifact(path) for root in self.roots for stage in stages for path in artifacts_in(root, stage)]

    def upstream(self, artifact: Artifact, but: Collection[str] = ()) -> list[Artifact]:
        """The artifact and everything it was made from, as far as it is on disk, each once; not by the inputs `but`."""
        artifacts = {artifact.address: artifact}
        queue = [artifact]
        while queue:
            for name, address in queue.pop(0).inputs.items():
                parent = None if name in but else self.get(address)
                if parent is not None and address not in artifacts:
                    artifacts[address] = parent
                    queue.append(parent)
        return list(artifacts.values())


def find_evaluated(folder: Path) -> list[Path]:
    """Folders of evaluated artifacts: all of an artifacts folder, or what the jobs of a sweep asked for."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of artifacts or the folder of a sweep")
    if (folder / "evaluated").is_dir():
        return artifacts_in(folder, "evaluated")
    return _results(folder, ("evaluated",))


def find_analyses(folder: Path) -> list[Path]:
    """Folders of analyses that the jobs of a sweep asked for; those of an artifacts folder are found with it."""
    return [] if (folder / "evaluated").is_dir() else _results(folder, tuple(ANALYSES.values()))


def _results(folder: Path, stages: tuple[str, ...]) -> list[Path]:
    """What the jobs of a sweep recorded, as far as it is of these stages."""
    paths = []
    for file in sorted(folder.glob("**/result.json")):
        result = shown_json(file)
        if not isinstance(result, dict) or result.get("stage") not in stages or not isinstance(result.get("path"), str):
            continue
        path = Path(result["path"])
        if path.parent.name not in stages or not is_artifact(path):
            raise UserError(f"{file} names {path}, which is gone; run the sweep again")
        paths.append(path)
    return paths
