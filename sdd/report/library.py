"""Artifacts on disk: manifests by address over one or more roots, and where evaluated ones are found.

An artifact is `<root>/<stage>/<address>/` with a `manifest.json` that names its inputs by address. The folder of a
sweep has one `result.json` per job that names the artifact the job asked for. Only reads; knows nothing of what the
stages mean.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdd.errors import UserError

MAKING = ("command", "config", "commit", "seconds", "created")
STAGES = (
    *("scores", "pruned", "rewrites", "targets", "tuned", "merged", "evaluated"),
    *("answered", "surprisals", "drafted", "shifted", "measured"),
)
ANALYSES = ("drafted", "shifted", "measured")


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


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read; build its artifact again") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON (line {error.lineno}); build its artifact again") from error


def read_artifact(path: Path) -> Artifact:
    manifest = read_json(path / "manifest.json")
    if not {"stage", "address"} <= set(manifest):
        raise UserError(f"{path}/manifest.json names no stage and address; build its artifact again")
    return Artifact(
        path=path,
        stage=manifest["stage"],
        address=manifest["address"],
        version=manifest.get("version"),
        spec=manifest.get("spec") or {},
        inputs=manifest.get("inputs") or {},
        labels=manifest.get("labels") or {},
        record={name: manifest[name] for name in MAKING if manifest.get(name)},
    )


class Library:
    """Artifacts by address, over one or more roots."""

    def __init__(self, roots: Iterable[Path]) -> None:
        self.roots = list(dict.fromkeys(root.resolve() for root in roots))
        self._known: dict[str, Artifact | None] = {}

    def get(self, address: str) -> Artifact | None:
        if address not in self._known:
            folders = (root / stage / address for root in self.roots for stage in STAGES)
            found = next((folder for folder in folders if (folder / "manifest.json").is_file()), None)
            self._known[address] = read_artifact(found) if found else None
        return self._known[address]

    def evaluated(self) -> list[Artifact]:
        return self.of_stages(["evaluated"])

    def of_stages(self, stages: Iterable[str]) -> list[Artifact]:
        folders = [root / stage for root in self.roots for stage in stages]
        manifests = (path for folder in folders for path in sorted(folder.glob("*/manifest.json")))
        return [read_artifact(path.parent) for path in manifests]

    def upstream(self, artifact: Artifact) -> list[Artifact]:
        """The artifact and everything it was made from, as far as it is on disk, each once."""
        found = {artifact.address: artifact}
        queue = [artifact]
        while queue:
            for address in queue.pop(0).inputs.values():
                parent = self.get(address)
                if parent is not None and address not in found:
                    found[address] = parent
                    queue.append(parent)
        return list(found.values())


def find_evaluated(folder: Path) -> list[Path]:
    """Folders of evaluated artifacts: all of an artifacts folder, or what the jobs of a sweep asked for."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of artifacts or the folder of a sweep")
    if (folder / "evaluated").is_dir():
        return [path.parent for path in sorted(folder.glob("evaluated/*/manifest.json"))]
    return _asked_for(folder, ("evaluated",))


def find_analyses(folder: Path) -> list[Path]:
    """Folders of analyses that the jobs of a sweep asked for; those of an artifacts folder are found with it."""
    return [] if (folder / "evaluated").is_dir() else _asked_for(folder, ANALYSES)


def _asked_for(folder: Path, stages: tuple[str, ...]) -> list[Path]:
    """What the jobs of a sweep recorded, as far as it is of these stages."""
    paths = []
    for file in sorted(folder.glob("**/result.json")):
        result = read_json(file)
        if not isinstance(result, dict) or result.get("stage") not in stages or "path" not in result:
            continue
        path = Path(result["path"])
        if not (path / "manifest.json").is_file():
            raise UserError(f"{file} names {path}, which is gone; run the sweep again")
        paths.append(path)
    return paths
