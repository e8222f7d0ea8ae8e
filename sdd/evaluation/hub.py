"""Rows of lm-eval's tasks on the Hugging Face Hub, at a commit.

`datasets` keeps what it fetched by commit, but without a network it takes whichever commit came last, after half a
minute of trying: rows of a commit that is kept are read here without asking, as models are.
"""

import re
from pathlib import Path
from typing import Any

from sdd.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
"""The name of a folder of the library's cache; its older versions name them otherwise."""


def rows_at(repository: str, name: str | None, revision: str, **given: Any) -> Any:
    """The splits of a dataset's configuration at the commit `revision`; `given` is what a task says besides."""
    from datasets import load_dataset

    kept = None if given else _kept(repository, name, revision)
    if kept is not None:
        return kept
    splits = load_dataset(repository, name, revision=revision, **given)
    folders = [Path(file["filename"]).parent.name for rows in splits.values() for file in rows.cache_files]
    if other := next((folder for folder in folders if COMMIT.fullmatch(folder) and folder != revision), None):
        raise UserError(
            f"{repository}: the hub cannot be reached, and the rows that are kept are those of commit {other}, not of "
            f"{revision}; connect, or name local files with evaluation.data_dir"
        )
    return splits


def _kept(repository: str, name: str | None, commit: str) -> Any | None:
    """The same from the library's cache, if they are there."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    *owner, own = repository.split("/")
    folder = Path(config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(own)]), name or "default")
    for path in folder.glob(f"*/{commit}"):
        at: dict[str, Any] = {"config_name": folder.name, "version": path.parent.name, "hash": commit}
        return Cache(dataset_name=own, repo_id=repository, **at).as_dataset()
    return None
