"""Artifacts on disk: complete or absent, built once however many processes ask.

`<root>/<stage>/<address>/` is published by a rename, its manifest written last. Building happens in
`<root>/.partial/<stage>/<address>/` under a file lock that the operating system drops when its holder dies, so a dead
builder blocks nobody, and what a stage can continue from is still there. Knows nothing of how anything is computed: a
builder is a function of a recipe, the folders of its inputs, and the folder to fill.
"""

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, SoftFileLock, Timeout

from sdd.errors import UserError
from sdd.store.digests import file_digest, write_atomically
from sdd.store.hashed import taken_digest
from sdd.store.mounts import locks_only_here
from sdd.store.recipe import Recipe, address_of
from sdd.store.stages import STAGES
from sdd.untrusted import ANY, check_inside, check_regular, check_shape, printable, read_json

log = logging.getLogger(__name__)

TIMINGS = "timings.json"
"""File of an artifact that says what the machine took that built it: no content of the recipe."""
SCRATCH = "scratch"
"""Folder inside a partial artifact for what a stage continues from; removed before publication."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
LOOK_ROUND = 2.0
"""Seconds that are waited for another process before it is looked for other work again."""
MANIFEST = "manifest.json"
ADDRESS = re.compile(r"[0-9a-f]{16}")
DEEPEST_FOLDER = 20
"""Levels of folders in an artifact; stages make two."""
LARGEST = 16 << 20
"""Bytes of a manifest; a merged student's holds a few thousand."""
UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
"""What the system says of a folder that nothing can be put into."""
FIELDS = {
    "stage": str,
    "address": str,
    "version": int,
    "spec": {str: ANY},
    "inputs": {str: str},
    "labels": {str: str},
    "files": {str: str},
    "seconds": float,
    "created": str,
    "commit?": (str, None),
    "versions?": {str: str},
    "command?": str,
    "config?": {str: ANY},
    "digest?": str,
}
"""What a manifest of a store's holds; `digest` is of all else that it says, which older ones have not."""
LINKED = {
    key if key.endswith("?") or key in ("stage", "address", "inputs") else f"{key}?": FIELDS[key] for key in FIELDS
}
"""The same as far as a stage needs it of an input."""
_PACKAGES = ("torch", "transformers", "peft", "pytorch-lightning", "lm-eval", "tokenizers", "safetensors", "numpy")

Builder = Callable[[Recipe, Mapping[str, Path], Path], None]
"""Called with a recipe, the folders of its inputs, and the folder to fill."""


class Store:
    """The artifacts under one root folder; `provenance` tells what manifests of new ones say of who asked for them."""

    def __init__(self, root: Path | str, provenance: Callable[[], Mapping[str, Any]] = dict) -> None:
        self.root = Path(root)
        self.provenance = provenance

    def folder(self, recipe: Recipe) -> Path:
        return self.root / recipe.stage / recipe.address

    def partial(self, recipe: Recipe) -> Path:
        """Where its artifact is built."""
        return self.root / ".partial" / recipe.stage / recipe.address

    def inputs(self, recipe: Recipe) -> dict[str, Path]:
        return {name: self.folder(upstream) for name, upstream in recipe.inputs.items()}

    def has(self, recipe: Recipe) -> bool:
        return is_complete(self.folder(recipe))

    def missing(self, recipe: Recipe) -> list[Recipe]:
        """What has to be built for the recipe's artifact, inputs first; nothing where it is there."""
        if is_complete(self.folder(recipe)):
            return []
        lacking = {one.address: one for upstream in recipe.inputs.values() for one in self.missing(upstream)}
        return [*lacking.values(), recipe]

    def ensure(
        self,
        recipe: Recipe,
        build: Builder,
        missing: str = "build",
        meanwhile: Callable[[], bool] = lambda: False,
    ) -> Path:
        """The folder of the artifact, built with all it needs if it is not there.

        With `missing="raise"` only the artifact asked for is built; lacking inputs are a user's mistake. Where others
        build all that can be built now, `meanwhile` is called, which says whether it had something to do; if not, this
        process waits.
        """
        folder, told = self.folder(recipe), None
        if missing == "raise" and not is_complete(folder):
            for upstream in recipe.inputs.values():
                if not self.has(upstream):
                    raise UserError(
                        f"{upstream.stage}/{upstream.address} is missing and store.missing=raise; "
                        f"build it with: python {STAGES[upstream.stage].script}.py and the same settings"
                    )
        while not is_complete(folder):
            if self.advance(recipe, build, missing) or meanwhile():
                continue
            held = next(self._ready(recipe, missing), None)
            if held is not None:
                if held.address != told:
                    log.info("%s/%s is being built by another process; waiting for it", held.stage, held.address)
                told = held.address
                self._built(held, build, LOOK_ROUND)
        return folder

    def advance(self, recipe: Recipe, build: Builder, missing: str = "build") -> bool:
        """Have one artifact built that is missing for a recipe and that nobody else builds; whether there was one."""
        return any(self._built(one, build, 0) for one in self._ready(recipe, missing))

    def _ready(self, recipe: Recipe, missing: str) -> Iterator[Recipe]:
        """What is missing for a recipe, and all inputs of which are there."""
        wanted = self.missing(recipe) if missing == "build" else [recipe]
        return (one for one in wanted if all(map(self.has, one.inputs.values())))

    def _built(self, recipe: Recipe, build: Builder, patience: float) -> bool:
        """Whether the artifact is there, built here if need be; no, if another process holds it for so many seconds."""
        folder, partial = self.folder(recipe), self.partial(recipe)
        self._make(partial.parent)
        _warn_of_locks(self.root)
        lock = self._acquired(partial, patience)
        if lock is None:
            return False
        try:
            if not is_complete(folder):
                self._build(recipe, self.inputs(recipe), build, partial, folder)
        finally:
            lock.release()
        return True

    def _acquired(self, partial: Path, patience: float) -> FileLock | None:
        """The lock of what is built there; none, if another process holds it for so many seconds."""
        lock = FileLock(partial.with_suffix(".lock"))
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            return None
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise self._unusable(error) from None
            raise self._without_locks() from None
        if isinstance(lock, SoftFileLock):  # what stands in for a lock there outlives its holder
            lock.release()
            raise self._without_locks()
        return lock

    def _without_locks(self) -> UserError:
        return UserError(
            f"paths.artifacts={self.root} lies on a file system that has no locks, without which two processes would "
            "build the same; choose another folder, or mount it with them"
        )

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> Exception:
        """One line where nothing can be put into the folder of artifacts; else the error itself."""
        if error.errno not in UNUSABLE:
            return error
        return UserError(f"paths.artifacts={self.root} cannot be used: {error.strerror}: {error.filename}")

    def _build(self, recipe: Recipe, inputs: dict[str, Path], build: Builder, partial: Path, folder: Path) -> None:
        resumable = STAGES[recipe.stage].resumable
        _clear(partial, (SCRATCH,) if resumable else ())
        partial.mkdir(exist_ok=True)
        started = time.time()
        log.info("building %s/%s", recipe.stage, recipe.address)
        try:
            build(recipe, inputs, partial)
            manifest = self._manifest(recipe, partial, time.time() - started)
            write_atomically(partial / MANIFEST, manifest_text(manifest))
        except BaseException:
            nothing_kept = not resumable or not any((partial / SCRATCH).glob("*"))
            if nothing_kept:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(partial / SCRATCH, ignore_errors=True)
        share(partial)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():  # without a manifest: a deletion that was cut short
            shutil.rmtree(folder)
        os.replace(partial, folder)
        log.info("%s/%s built in %.1f s", recipe.stage, recipe.address, manifest["seconds"])

    def _manifest(self, recipe: Recipe, partial: Path, seconds: float) -> dict[str, Any]:
        files = [path for path in files_of(partial) if path.relative_to(partial).parts[0] != SCRATCH]
        return {
            "stage": recipe.stage,
            "address": recipe.address,
            "version": recipe.version,
            "spec": recipe.spec,
            "inputs": {name: upstream.address for name, upstream in recipe.inputs.items()},
            "labels": recipe.labels,
            "files": {str(path.relative_to(partial)): taken_digest(path) for path in files},
            "seconds": round(seconds, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": current_commit(),
            "versions": installed_versions(),
            **self.provenance(),
        }

    # ---- looking at what is there ------------------------------------------------------------------------------

    def folders(self) -> list[Path]:
        """The folders of all complete artifacts, by stage, then by address; a link is none."""
        paths = [path for stage in STAGES for path in sorted((self.root / stage).glob(f"*/{MANIFEST}"))]
        return [path.parent for path in paths if is_place(path.parent)]

    def partials(self) -> list[Path]:
        """The folders in which artifacts are being built, or were when a process ended; a link is none."""
        root = self.root / ".partial"
        paths = [path for stage in STAGES for path in sorted((root / stage).glob("*")) if not root.is_symlink()]
        return [path for path in paths if is_place(path)]

    def is_held(self, partial: Path) -> bool:
        """Whether a process is building there."""
        lock = self._acquired(partial, 0)
        if lock is not None:
            lock.release()
        return lock is None

    def manifests(self) -> list[dict[str, Any]]:
        return [self.manifest(folder) for folder in self.folders()]

    def manifest(self, folder: Path) -> dict[str, Any]:
        """The whole manifest of an artifact of this store."""
        if folder.parent.parent != self.root or not is_place(folder):
            raise UserError(f"{folder}: no artifact, which is a folder STAGE/ADDRESS of {self.root} and no link")
        manifest = read_manifest(folder)
        check_shape(manifest, FIELDS, _damaged(folder))
        return manifest

    def find(self, address: str) -> Path:
        """The folder of a complete artifact by its address, or an unambiguous start of it; perhaps behind its stage."""
        stage, _, start = address.rpartition("/")
        if ADDRESS.fullmatch(start):
            places = [self.root / one / start for one in STAGES]
            hits = [place for place in places if is_place(place) and (place / MANIFEST).exists()]
        else:
            hits = [folder for folder in self.folders() if start and folder.name.startswith(start)]
        if stage:
            hits = [folder for folder in hits if folder.parent.name == stage]
        if len(hits) != 1:
            what = "no artifact" if not hits else f"{len(hits)} artifacts"
            raise UserError(
                f"{what} under {self.root} with address {printable(address[:80])}; see: python -m sdd.store list"
            )
        return hits[0]

    def verify(self, folder: Path) -> list[str]:
        """What is wrong with a complete artifact: files changed, missing, or unlisted; the manifest."""
        try:
            manifest = self.manifest(folder)
            recorded: dict[str, str] = manifest["files"]
            address = address_of(*(manifest[key] for key in ("stage", "version", "spec", "inputs")))
        except (UserError, ValueError):
            return ["changed manifest.json: it cannot be read"]
        if (folder.parent.name, folder.name) != (manifest["stage"], address):
            return [f"changed manifest.json: its recipe is {manifest['stage']}/{address}"]
        if unknown := manifest.keys() - {key.removesuffix("?") for key in FIELDS}:
            return [printable(f"changed manifest.json: it holds {min(unknown)!r}")]
        if manifest.pop("digest", None) and (folder / MANIFEST).read_bytes() != manifest_text(manifest).encode():
            return ["changed manifest.json: it has another digest"]
        present = {str(path.relative_to(folder)) for path in _leaves(folder)} - {MANIFEST}
        problems = [f"missing {name}" for name in sorted(set(recorded) - present)]
        problems += [f"not in the manifest: {name}" for name in sorted(present - set(recorded))]
        for name in sorted(present & set(recorded)):
            try:
                check_inside(folder / name, folder, name)
                check_regular(folder / name, name)
            except UserError as error:
                problems.append(f"changed {error}")
                continue
            if file_digest(folder / name) != recorded[name]:
                problems.append(f"changed {name}")
        return [printable(problem) for problem in problems]


@cache
def _warn_of_locks(root: Path) -> None:
    if mount := locks_only_here(root):
        log.warning(
            "paths.artifacts=%s lies on %s: its locks keep out processes of this machine only; do not build there from "
            "several machines at once",
            root,
            mount,
        )


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """The file of a manifest: what it says, and the sha256 of that."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "digest": digest}, indent=1) + "\n"


def is_complete(folder: Path) -> bool:
    """Whether a folder is a published artifact: its manifest is written last."""
    return (folder / MANIFEST).is_file()


def _clear(partial: Path, kept: Collection[str]) -> None:
    """Remove what a build that was cut short left, but what is gone on from; half-written files among that go too."""
    left = list(partial.iterdir()) if partial.is_dir() else []
    for path in [*left, *(path for name in kept for path in (partial / name).glob(".*"))]:
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _leaves(folder: Path) -> list[Path]:
    """All that lies in a folder but folders: files, links to whatever, pipes."""
    return sorted(path for path in _below(folder) if path.is_symlink() or not path.is_dir())


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in _below(folder) if path.is_file())


def _below(folder: Path) -> list[Path]:
    """All that lies in a folder, at any level that a stage makes; links are not followed."""
    folders, level = [], [folder]
    for _ in range(DEEPEST_FOLDER):
        inner = [path for one in level for path in one.iterdir()]
        level = [path for path in inner if path.is_dir() and not path.is_symlink()]
        folders += inner
        if not level:
            return folders
    raise UserError(f"{folder}: folders in folders, more than {DEEPEST_FOLDER} deep; delete it")


def share(folder: Path) -> None:
    """Let those read the files who may read the folder; temporary files, and weights, begin as their owner's alone."""
    readable = folder.stat().st_mode & 0o666
    for path in files_of(folder):
        path.chmod(readable)


def is_place(folder: Path) -> bool:
    """Whether a folder lies where an artifact does, `<stage>/<address>`, no link among the two."""
    named = folder.parent.name in STAGES and ADDRESS.fullmatch(folder.name) is not None
    return named and folder.is_dir() and not folder.is_symlink() and not folder.parent.is_symlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete artifact, checked: it says where it lies, and names files within its folder."""
    what = _damaged(folder)
    if folder.is_symlink() or folder.parent.is_symlink():
        raise UserError(f"{folder}: a link, which is no artifact")
    check_inside(folder / MANIFEST, folder, what)
    manifest = read_json(folder / MANIFEST, what, LARGEST)
    check_shape(manifest, LINKED, what)
    if (manifest["stage"], manifest["address"]) != (folder.parent.name, folder.name):
        raise UserError(f"{what}: it is of another artifact")
    if not all(map(ADDRESS.fullmatch, manifest["inputs"].values())) or folder.name in manifest["inputs"].values():
        raise UserError(f"{what}: an input that is no address")
    if not all(map(is_inner, manifest.get("files", ()))):
        raise UserError(f"{what}: a file outside")
    return manifest


def _damaged(folder: Path) -> str:
    return f"{folder}/{MANIFEST} is damaged; delete the folder and build it again"


def is_inner(name: str) -> bool:
    """Whether a file's name stays within its folder, on any system, and steers no terminal."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and ":" not in name and not {"", ".", ".."} & set(parts)


@cache
def current_commit() -> str | None:
    """The commit of the checkout this package runs from, `+` when files differ from it; None outside a checkout.

    Looked up once: what a process has imported stays what it was.
    """
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("+" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@cache
def installed_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
