"""From the folder of a sweep, or of a report above sweeps, to the members of a bundle.

Every job is composed once more from the words that it recorded, which says which config files it was made of, and that
they are still what they were. What is written is masked as in manifests; a member that names a folder of this machine
all the same is refused.
"""

import importlib.metadata
import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from sdd.api import composing
from sdd.cli.config_files import PACKAGE, config_folder
from sdd.cli.job import typed
from sdd.cli.students import composed_before, composed_students
from sdd.cli.sweep import LARGEST, RECORD
from sdd.config import plain
from sdd.config.provenance import LEFT_OUT, provenance, shareable, shared_words
from sdd.config.shared import check_yaml
from sdd.errors import UserError
from sdd.share.bundle import FORMAT, STUDY
from sdd.store import STAGES, Store
from sdd.store.files import AGAIN, shown_json
from sdd.store.store import MANIFEST, current_commit, installed_versions, is_place
from sdd.untrusted import check_inside, check_regular, check_shape, read_json, read_text

REPORT = (".json", ".md", ".csv", ".tex", ".png", ".svg", ".html")
LARGEST_REPORT = 64 << 20
"""Bytes of one of its files."""
TABLE = [{"arm": str, "addresses?": [str]}]
NOT_CARRIED = ("hydra", "allow", *(name for name in LEFT_OUT if name != "study"))
"""What a bundle takes from no config: where things are put, who tracks them, whose code may run."""

Members = dict[str, bytes | Path]


def members_of(folder: Path, allowed: Sequence[str] = (), weights: bool = False) -> Members:
    """Names in the bundle -> what stands there."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a sweep, or of a report above sweeps")
    gathered = _Gathered()
    for record in _records(folder):
        gathered.add_recorded(record, allowed)
    if not gathered.jobs:
        raise UserError(f"{folder} holds no job that built anything (no result.json); give the folder of a sweep")
    report = folder / "report" if (folder / "report" / "table.json").exists() else folder
    if (report / "table.json").exists():
        gathered.add_report(report)
    elif any(job["stage"] == "evaluated" for job in gathered.jobs):
        raise UserError(f"{folder} holds no report; run: python -m sdd.report {folder} --out {folder}/report")
    members = gathered.members | _environment()
    for address, store in gathered.stores.items():
        members |= _artifacts(store, address, weights)
    stages = {name: stage.version for name, stage in STAGES.items()}
    facts = {"format": FORMAT, "jobs": gathered.jobs, "stages": stages}
    members[STUDY] = _json(facts | {"versions": installed_versions(), "commit": current_commit()})
    _check_places(members)
    return members


class _Gathered:
    """Jobs, their members, and by the address of what each built the store that holds it."""

    def __init__(self) -> None:
        self.members: Members = {}
        self.jobs: list[dict[str, Any]] = []
        self.stores: dict[str, Store] = {}

    def add_job(self, script: str, overrides: Iterable[str], place: Path, config: dict[str, Any]) -> None:
        words = [word for word in shared_words(overrides) if _group(word) not in NOT_CARRIED]
        self.members[f"jobs/{len(self.jobs)}/config.yaml"] = _yaml(config)
        self.jobs.append({"script": script, "overrides": words, "stage": place.parent.name, "address": place.name})
        self.stores[place.name] = Store(place.parent.parent)

    def add_recorded(self, record: dict[str, Any], allowed: Sequence[str]) -> None:
        """A job of a sweep, with the config files that it is made of."""
        folder, place = record["folder"], Path(record["path"])
        if not is_place(place) or not (place / MANIFEST).is_file():
            raise UserError(f"{folder} names {place}, which is gone; run the sweep again")
        config, given = _composed(record, allowed)
        for name, file in given.items():
            content = _carried(file, name)
            if self.members.setdefault(f"given/{name}", content) != content:
                raise UserError(f"{folder} has another {name} than the jobs before; share their sweeps one by one")
        self.add_job(record["script"], record["overrides"], place, config)

    def add_report(self, folder: Path) -> None:
        """Tables and page, and what the table rests on besides: the unpruned model's results, found beside theirs."""
        self.members |= _report(folder)
        rows = shown_json(folder / "table.json", TABLE)
        for address in sorted({address for row in rows for address in row.get("addresses", [])} - self.stores.keys()):
            places = (store.root / "evaluated" / address for store in self.stores.values())
            place = next((place for place in places if is_place(place) and (place / MANIFEST).is_file()), None)
            if place is None:
                raise UserError(f"{folder}/table.json rests on {address}, which is gone; write the report again")
            manifest = Store(place.parent.parent).manifest(place)
            self.add_job(*_command(manifest), place, manifest.get("config", {}))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _yaml(value: Any) -> bytes:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=1 << 16)
    return text.encode()


def _group(override: str) -> str:
    return re.split(r"[./@=]", override.lstrip("+~"))[0]


# ---- what the jobs recorded -----------------------------------------------------------------------------------------


def _records(folder: Path) -> list[dict[str, Any]]:
    """The records of the jobs that built something, in the order of their folders' numbers; equal ones once."""
    records: dict[str, dict[str, Any]] = {}
    files = folder.rglob("result.json")
    for file in sorted(files, key=lambda file: [(len(part), part) for part in file.relative_to(folder).parts]):
        record = read_json(file, f"{file}", LARGEST)
        check_shape(record, RECORD | {"script": str}, f"{file}")
        if record.get("stage") in STAGES and "path" in record and "error" not in record:
            key = json.dumps([record["script"], record["overrides"]])
            records.setdefault(key, record | {"folder": file.parent})
    return list(records.values())


def _composed(record: dict[str, Any], allowed: Sequence[str]) -> tuple[dict[str, Any], dict[str, Path]]:
    """The job's config as a manifest has it, composed anew, and the files of named folders that it was made of."""
    folder, words = record["folder"], [word for word in record["overrides"] if _group(word) not in NOT_CARRIED]
    words += [f"allow=[{','.join(allowed)}]"] if allowed else []
    recorded = _read_yaml(folder / ".hydra" / "config.yaml")
    with composing(words, _named_folders(folder)) as (config, loader):
        own = OmegaConf.to_container(config, resolve=False)
        assert isinstance(own, dict)
        for key in recorded.keys() | own.keys() - {"hydra"}:
            if key not in NOT_CARRIED and recorded.get(key) != own.get(key):
                raise UserError(
                    f"{folder}: {key} is composed otherwise than when it ran; have its config files changed?"
                )
        for student in [(config, typed()), *composed_students(config)]:  # whose files are carried too
            before = composed_before(*student)
            while before is not None:
                before = composed_before(*before)
        values = plain(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
        given = {f"{name.removesuffix('.yaml')}.yaml": place for name, place in loader.given.items()}
    shared: dict[str, Any] = provenance(record["script"], words, values)["config"]
    shared.pop("allow", None)
    return shared, {name: place / name for name, place in given.items()}


def _read_yaml(file: Path) -> dict[str, Any]:
    text = read_text(file, f"{file}", LARGEST)
    check_yaml(text, f"{file}")
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is not as Hydra writes it; run the job again")
    return {str(key): value for key, value in content.items()}


def _named_folders(folder: Path) -> list[Path]:
    """The config folders that the job's command line named."""
    file = folder / ".hydra" / "hydra.yaml"
    hydra = _read_yaml(file)
    shape = {"hydra": {"runtime": {"config_sources": [{"path": str, "schema": str, "provider": str}]}}}
    check_shape(hydra, shape, f"{file}")
    sources = hydra["hydra"]["runtime"]["config_sources"]
    named = [Path(source["path"]) for source in sources if source["schema"] == "file" and source["provider"] != "main"]
    return [path for path in named if path.is_dir() and not path.samefile(config_folder())]


def _carried(file: Path, name: str) -> bytes:
    """A config file without what a bundle does not hold; where its settings go is kept."""
    text = read_text(file, name, LARGEST)
    check_yaml(text, name)
    content = yaml.safe_load(text)
    kept = {key: value for key, value in (content or {}).items() if key not in NOT_CARRIED}
    defaults = {"defaults": kept.pop("defaults")} if "defaults" in kept else {}
    header = re.findall(r"^\s*#\s*@package\s+[\w.]+", text, re.M)[:1]
    return "".join(f"{line.strip()}\n" for line in header).encode() + _yaml(defaults | shareable(kept))


# ---- what they built ------------------------------------------------------------------------------------------------


def _command(manifest: dict[str, Any]) -> tuple[str, list[str]]:
    """The script that asked for an artifact, and its overrides."""
    words = shlex.split(manifest.get("command", ""))
    if not words:
        raise UserError(f"{manifest['stage']}/{manifest['address']} does not say what asked for it; {AGAIN}")
    return STAGES[manifest["stage"]].script, [word for word in words if "=" in word or word.startswith("~")]


def _artifacts(store: Store, address: str, weights: bool) -> Members:
    """Manifests of an artifact and of all that it was made from; with weights, all of their files."""
    members: Members = {}
    queue = [address]
    while queue:
        folder = store.find(queue.pop())
        place = f"artifacts/{folder.parent.name}/{folder.name}"
        if f"{place}/{MANIFEST}" in members:
            continue
        manifest = store.manifest(folder)
        members[f"{place}/{MANIFEST}"] = _json(manifest)
        queue += manifest["inputs"].values()
        for name in manifest["files"] if weights else ():
            check_inside(folder / name, folder, f"{folder}/{name}")
            members[f"{place}/{name}"] = folder / name
    return members


def _report(folder: Path) -> Members:
    members: Members = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in REPORT or path.name == "result.json":
            continue
        check_inside(path, folder, f"{path}")
        if check_regular(path, f"{path}").st_size > LARGEST_REPORT or path.is_symlink():
            raise UserError(f"{path}: a link, or more than {LARGEST_REPORT:,} bytes; take it out of the folder")
        members[f"report/{path.name}"] = path.read_bytes()
    return members


# ---- what they ran on -----------------------------------------------------------------------------------------------


def _environment() -> Members:
    packages = {
        f"{re.sub(r'[-_.]+', '-', name).lower()}=={package.version}\n"
        for package in importlib.metadata.distributions()
        if (name := package.metadata["Name"])
    }
    members: Members = {"installed.txt": "".join(sorted(packages)).encode()}
    lock = PACKAGE.parent / "requirements.lock"
    return members | ({"requirements.lock": lock.read_bytes()} if lock.is_file() else {})


def _check_places(members: Members) -> None:
    places = {f"{place}/".encode() for place in (Path.home(), Path.cwd()) if len(str(place)) > 4}
    for name, content in members.items():
        if isinstance(content, bytes) and any(place in content for place in places):
            raise UserError(f"{name} names a folder of this machine, which a bundle may not; nothing was written")
