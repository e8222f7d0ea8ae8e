"""What of a bundle can be repeated here: whether packages, stages, settings, models and data are the same.

Every job is composed anew from its overrides and the bundle's config files, as the files of a stranger that they are.
An address that is the same says that all of it is: it is a hash of the recipe, which names models and data by digest.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdd.api import Job, compose
from sdd.config import plain
from sdd.config.provenance import provenance
from sdd.config.shared import LARGEST, check_words, check_yaml
from sdd.errors import UserError
from sdd.share.bundle import FORMAT, STUDY
from sdd.stages.__main__ import recipe_of
from sdd.store import STAGES, Recipe, Store
from sdd.store.__main__ import differences, flat
from sdd.store.files import read_facts
from sdd.store.store import MANIFEST, installed_versions
from sdd.study import is_provisional
from sdd.untrusted import ANY, check_shape, read_text

SHAPE = {
    "format": int,
    "jobs": [{"script": str, "overrides": [str], "stage": str, "address": str}],
    "stages": {str: int},
    "versions": {str: str},
}
SCRIPTS = {stage.script for stage in STAGES.values()}
MOST_JOBS = 1_000
MOST_INPUTS = 20_000
"""Artifacts, counted once for each way to them, that all jobs together are made from."""
MOST_LINES = 12
"""Lines about one kind of difference."""
CUT = re.compile(r"\.\.\./|\*\*\*|\.\.(?=/|$)")
"""In an override: what was left out when it was recorded, or leads to a place that only its machine has."""


@dataclass(frozen=True)
class Repeated:
    """A job of the bundle's, composed here."""

    script: str
    job: Job
    wanted: Recipe
    recorded: Recipe
    settings: dict[str, tuple[Any, Any]]
    """Settings that are composed otherwise than they were, which was -> which is."""

    @property
    def is_same(self) -> bool:
        return self.wanted.address == self.recorded.address


class Study:
    """What a bundle holds, taken out into a folder and checked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_facts(folder / STUDY, SHAPE)
        if self.facts["format"] != FORMAT:
            raise UserError(f"{STUDY}: format {self.facts['format']}, not {FORMAT}; it is of another version of sdd")
        if not 0 < len(self.facts["jobs"]) <= MOST_JOBS:
            raise UserError(f"{STUDY}: {len(self.facts['jobs']):,} jobs; a bundle has 1 to {MOST_JOBS:,}")
        self.store = Store(folder / "artifacts")
        self.manifests = {manifest["address"]: manifest for manifest in self.store.manifests()}
        self.inputs_left = iter(range(MOST_INPUTS))
        for number, job in enumerate(self.facts["jobs"]):
            check_words((word for word in job["overrides"] if not _is_cut(word)), f"{STUDY}: job {number}")
            if job["script"] not in SCRIPTS:
                raise UserError(f"{STUDY}: job {number}: no script {job['script'][:80]!r}")

    def repeated(self, number: int, typed: Sequence[str], dry: bool) -> Repeated:
        """A job as it is composed here, with the user's words after its own."""
        job, place = self.facts["jobs"][number], f"job {number}"
        manifest = self.manifests.get(job["address"])
        if manifest is None or manifest["stage"] != job["stage"]:
            raise UserError(f"{place}: the bundle has no manifest of {job['stage'][:40]}/{job['address'][:40]}")
        recorded, config = recipe_of(self.store, manifest, self.inputs_left), self._config(number)
        typed_keys = {_key(word) for word in typed}
        words = [word for word in job["overrides"] if _key(word) not in typed_keys]
        if cut := sorted(_key(word)[:80] for word in words if _is_cut(word)):
            raise UserError(f"{place}: {cut[0]} was another machine's; name yours after the bundle: {cut[0]}=...")
        given = self.folder / "given"
        dry_run = ["dry_run=true"] if dry else []
        try:
            composed = compose(*words, *typed, *dry_run, config_dir=given if given.is_dir() else None)
            wanted = composed.wanted(job["script"])
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        if wanted is None:
            raise UserError(f"{place}: asks for the unpruned model itself, which nothing builds")
        own = provenance(job["script"], words, plain(composed.config))["config"]
        settings = {
            key: (before, after)
            for key, before, after in _unlike(config, own)
            if not any(key == name or key.startswith(f"{name}.") for name in typed_keys)
        }
        return Repeated(job["script"], composed, wanted, recorded, settings)

    def _config(self, number: int) -> Any:
        path = self.folder / "jobs" / str(number) / "config.yaml"
        text = read_text(path, f"{path}", LARGEST)
        check_yaml(text, f"{path}")
        try:
            config = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
        check_shape(config, {str: ANY}, f"{path}")
        return config

    def reasons(self, job: Repeated) -> list[str]:
        """Why a recipe is another one here: what differs, inputs included."""
        for recipe in job.wanted.walk():
            folder = self.store.folder(recipe)
            if not (folder / MANIFEST).exists():
                folder.mkdir(parents=True)
                inputs = {name: upstream.address for name, upstream in recipe.inputs.items()}
                manifest = {"stage": recipe.stage, "address": recipe.address, "version": recipe.version}
                manifest |= {"spec": recipe.spec, "inputs": inputs, "labels": {}, "files": {}}
                manifest |= {"seconds": 0, "created": ""}
                (folder / MANIFEST).write_text(json.dumps(manifest))
        changed = differences(self.store, job.recorded.address, job.wanted.address)
        return [f"{one['where']}: {_short(one['a'])} | {_short(one['b'])}" for one in changed]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _is_cut(override: str) -> bool:
    return CUT.search(override.partition("=")[2]) is not None


def _unlike(before: Any, after: Any) -> Iterable[tuple[str, Any, Any]]:
    one, other = flat(before), flat(after)
    for key in sorted(one.keys() | other.keys()):
        if one.get(key) != other.get(key) and not CUT.search(str(one.get(key))) and key.split(".")[0] != "allow":
            yield key, one.get(key), other.get(key)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lines(title: str, changed: Iterable[str], alike: str = "the same") -> list[str]:
    """A heading, and below it what differs, each once with how many jobs it is of."""
    counted = Counter(changed)
    if not counted:
        return [f"{title}: {alike}"]
    lines = [f"  {line}" + (f" (in {number} jobs)" if number > 1 else "") for line, number in counted.most_common()]
    more = [f"  and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return [f"{title} (there | here):", *lines[:MOST_LINES], *more]


def described(study: Study, jobs: Sequence[Repeated]) -> tuple[list[str], bool]:
    """What a person wants to know before repeating it, as lines; and whether everything is as it was."""
    from sdd.stages.dry_run import planned, summary

    here, stages = installed_versions(), {name: stage.version for name, stage in STAGES.items()}
    packages = [f"{key} {a} | {b}" for key, a, b in _unlike(study.facts["versions"], here)]
    versions = [f"{key} {a} | {b}" for key, a, b in _unlike(study.facts["stages"], stages)]
    settings = [f"{k}: {_short(a)} | {_short(b)}" for job in jobs for k, (a, b) in job.settings.items()]
    unknown = [job for job in jobs if is_provisional(job.wanted)]
    other = [job for job in jobs if not job.is_same and not is_provisional(job.wanted)]
    for job in jobs:
        job.job.fit(job.job.store(job.script).missing(job.wanted))
    records = [p.record() for job in jobs for p in planned(job.wanted, job.job.study, job.job.store(job.script))]
    lines = [f"{len(jobs)} jobs, {len(study.manifests)} artifacts"]
    lines += _lines("packages", packages) + _lines("stages", versions) + _lines("settings", settings)
    lines += [f"addresses: {sum(job.is_same for job in jobs)} of {len(jobs)} jobs lead to the same"]
    if unknown:
        lines.append(f"  {len(unknown)} are known once their models and data have been fetched")
    lines += _lines("recipes", (line for job in other for line in study.reasons(job))) if other else []
    missing = any(not record["exists"] for record in records)
    lines.append(f"here: {summary(records) if missing else 'all of it is built already'}")
    return lines, not (packages or versions or settings or unknown or other)
