"""Rows of a dataset repository on the Hugging Face Hub, pinned to a commit: fetched whole, or streamed where large.

A pinned commit is content, so recipes name it without asking the hub. Files that are fetched lie in the hub's own cache
and are read as local files are, so that work goes on without a network; what is streamed is drawn through a shuffle
buffer, and the rows that were drawn are kept beside that cache. Nothing of a repository is run.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from sdd.data.files import read_rows
from sdd.errors import UserError
from sdd.models.hub import HUB_ID, UNREACHABLE, explained, is_due_to, snapshot
from sdd.store import digest_of

log = logging.getLogger(__name__)

BUFFER_ROWS = 10_000
"""Rows in the buffer that a stream is shuffled through."""


@dataclass(frozen=True)
class Repository:
    """`files` are patterns of file names in the repository at the commit `revision` (40 hexadecimal digits)."""

    repository: str
    revision: str
    files: tuple[str, ...]
    stream: bool = False

    @classmethod
    def of(cls, node: dict[str, Any], setting: str) -> "Repository":
        """From a config's `hub` node; `setting` is what errors call it, as in "dataset"."""
        where = f"{setting}.hub.revision={node.get('revision')}"
        if not re.fullmatch(r"[0-9a-f]{40}", str(node.get("revision"))):
            raise UserError(
                f"{where} is no commit; pin {setting}.hub.revision to the 40 hexadecimal digits of one "
                f"(https://huggingface.co/datasets/{node['repository']}/commits), or name local files by {setting}.path"
            )
        if not HUB_ID.fullmatch(node["repository"]):
            raise UserError(f"{setting}.hub.repository={node['repository']} is no repository; write OWNER/NAME")
        if not node.get("files"):
            raise UserError(f"{setting}.hub.files names no file of {node['repository']}")
        return cls(node["repository"], node["revision"], tuple(node["files"]), bool(node.get("stream")))

    def spec(self) -> dict[str, Any]:
        """What recipes say of it."""
        return {**asdict(self), "files": list(self.files)}

    @property
    def digest(self) -> str:
        return digest_of(self.spec())


@lru_cache(maxsize=8)
def fetched_rows(
    source: Repository, setting: str, columns: tuple[str, ...], instead: str | None = None
) -> Sequence[tuple[str, dict[str, Any]]]:
    """(place, row) of every row of the repository's files, which are downloaded unless they are in the hub's cache."""
    try:
        folder = _snapshot(source)
    except Exception as error:
        raise _refusal(source, setting, error) from None
    files = [path for pattern in source.files for path in sorted(folder.glob(pattern))]
    if not files:
        raise _no_file(source, setting)
    return list(read_rows(files, f"{setting}.hub.repository", columns, instead))


def _snapshot(source: Repository) -> Path:
    """The files in the hub's cache; those that are there already need no network."""
    arguments = (source.repository, source.revision, list(source.files), "dataset")
    try:
        return snapshot(*arguments)
    except Exception as error:
        if not is_due_to(error, *UNREACHABLE):
            raise
        return snapshot(*arguments, fetch=False)


@lru_cache(maxsize=8)
def streamed_rows(
    source: Repository, setting: str, count: int, seed: int | None
) -> Sequence[tuple[str, dict[str, Any]]]:
    """The first `count` rows of the stream, shuffled by `seed` through a buffer; in the repository's order if None."""
    with closing(stream(source, setting, seed)) as rows:
        return list(islice(rows, count))


def stream(source: Repository, setting: str, seed: int | None) -> Generator[tuple[str, dict[str, Any]]]:
    """(place, row) of a stream; close it where it is left.

    What was read of it before, on this machine, is not asked of the hub again.
    """
    place, kept = f"{setting}.hub.repository={source.repository}: row", _kept_file(source, seed)
    number = 0
    if kept.is_file():
        for number, (_, row) in enumerate(read_rows([kept], setting), 1):
            yield f"{place} {number} of the stream", row
    if _end_of(kept).is_file():
        return
    fresh: list[dict[str, Any]] = []
    is_whole = False
    try:
        for row in islice(_asked(source, setting, seed), number, None):
            fresh.append(row)
            yield f"{place} {number + len(fresh)} of the stream", row
        is_whole = True
    finally:
        _keep(kept, number, fresh, is_whole)


def _kept_file(source: Repository, seed: int | None) -> Path:
    """Where the rows that were read of a stream lie, beside the hub's cache: they may be shared as that is."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "sdd" / "streams" / f"{digest_of([source.spec(), seed])[:16]}.jsonl"


def _end_of(kept: Path) -> Path:
    """A file that is there where the kept rows are all that the stream has."""
    return kept.with_suffix(".end")


def _keep(path: Path, number: int, fresh: list[dict[str, Any]], is_whole: bool) -> None:
    """Add rows to the `number` that are kept, unless another process did, or the disk does not take them."""
    lines = [json.dumps(row, ensure_ascii=False, default=str) for row in fresh]
    if not (fresh or is_whole) or any(json.loads(line) != row for line, row in zip(lines, fresh, strict=True)):
        return  # rows of more than JSON's own types would be others when they are read again
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        if before.count("\n") != number:
            return
        with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
            file.write(before + "".join(f"{line}\n" for line in lines))
        os.replace(file.name, path)
        if is_whole:
            _end_of(path).touch()
    except OSError as error:
        log.warning("rows of a stream cannot be kept at %s: %s", path, error.strerror)


def _asked(source: Repository, setting: str, seed: int | None) -> Iterator[dict[str, Any]]:
    """The rows of a stream, asked of the hub."""
    from datasets import load_dataset

    kind = "parquet" if source.files[0].endswith(".parquet") else "json"
    try:
        names = _names(source)
        if not names:
            raise _no_file(source, setting)
        paths = [f"hf://datasets/{source.repository}@{source.revision}/{name}" for name in names]
        rows = load_dataset(kind, data_files=paths, split="train", streaming=True)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=BUFFER_ROWS)
        yield from rows
    except Exception as error:
        raise _refusal(source, setting, error) from None


def _names(source: Repository) -> list[str]:
    """The files that the patterns match, asked of the hub itself: `datasets` takes a refusal for an empty folder."""
    from huggingface_hub import HfApi

    api, names = HfApi(), []
    api.repo_info(source.repository, revision=source.revision, repo_type="dataset")  # see `snapshot`
    for pattern in source.files:
        folder = PurePosixPath(pattern).parent
        entries = api.list_repo_tree(
            source.repository,
            None if folder == PurePosixPath(".") else str(folder),
            revision=source.revision,
            repo_type="dataset",
        )
        names += sorted(entry.path for entry in entries if PurePosixPath(entry.path).match(pattern))
    return names


def _no_file(source: Repository, setting: str) -> UserError:
    name = f"{setting}.hub.repository={source.repository}"
    return UserError(f"{name} has no file {', '.join(source.files)} at {source.revision}")


def _refusal(source: Repository, setting: str, error: Exception) -> Exception:
    """One line for what the hub, or the way to it, says no with; other failures as they are."""
    if isinstance(error, UserError):
        return error
    name = f"{setting}.hub.repository={source.repository}"
    local = f"name local files with the same rows by {setting}.path"
    page = f"https://huggingface.co/datasets/{source.repository}"
    message = explained(error, name, page, f" and the files are not in its cache; connect, or {local}")
    if message is not None:
        return UserError(message)
    if is_due_to(error, "RevisionNotFoundError", "RevisionResolutionError"):
        return UserError(f"{name} has no commit {source.revision}; pin one of {page}/commits")
    if is_due_to(error, "RepositoryNotFoundError"):
        return UserError(f"{name}: there is no such dataset, or it is private; check the name, or {local}")
    if is_due_to(error, "EntryNotFoundError"):
        return _no_file(source, setting)
    return error
