"""Checkpoints of the Hugging Face hub: from an id and a revision to a folder in its usual cache.

Only what stock loading of safetensors reads is fetched: config, tokenizer, the weights that the index names, and the
model's page, which states the licence; never pickled weights, code, or a second copy of the weights in another layout.
Config and index come first, so that a model which cannot be used is refused before its weights are fetched. A revision
that is complete in the cache is taken as it is, without asking the network: the same command stays the same work, and
its content is in every address. Knows nothing of Hydra or the store's artifacts.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdd.errors import NotFetched, UserError
from sdd.models.checkpoints import Checkpoint
from sdd.models.files import SIDE_FILES, indexed_names
from sdd.untrusted import expanded

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""`owner/name`; anything else is a folder, and so is a folder of that name."""

PAGE = "README.md"
SMALL_FILES = ("config.json", "model.safetensors.index.json", PAGE, *SIDE_FILES)


def is_hub_id(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def checkpoint_folder(path: str, revision: str | None, fetch: bool = True) -> Path:
    """The folder of a checkpoint named by a folder or by a hub id; a folder is returned as it is, `revision` unread.

    What is not in the cache is fetched, or with `fetch=False` raises NotFetched.
    """
    if not is_hub_id(path):
        return expanded(path)
    cached = _cached(path, revision)
    if cached is not None:
        return cached
    if not fetch:
        raise NotFetched(f"model.path={path}: not in the Hugging Face cache; fetch it with: hf download {path}")
    folder = _fetched(path, revision)
    log.info("%s at commit %s", path, folder.name)
    return folder


def _cached(repo: str, revision: str | None) -> Path | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _checked(snapshot(repo, revision, list(SMALL_FILES), fetch=False), repo)
    except (LocalEntryNotFoundError, UserError):  # a fetch that was cut short is continued, what is refused told then
        return None


def _fetched(repo: str, revision: str | None) -> Path:
    folder = _download(repo, revision, list(SMALL_FILES))
    _refusals(folder, repo)
    weights = _weight_names(folder)
    if _download(repo, folder.name, weights) != folder:
        raise UserError(f"model.path={repo}: the hub changed while it was read; run the same command again")
    try:
        return _checked(folder, repo)
    except UserError as error:
        if not any((folder / name).exists() for name in weights) and (pickled := _pickled(repo, folder.name)):
            raise UserError(
                f"model.path={repo}: the weights are pickled ({pickled}), which can run code, and there are no "
                "safetensors; look for a converted copy"
            ) from None
        raise error


def _checked(folder: Path, repo: str) -> Path:
    """The folder, if config, tokenizer and all weights are there."""
    _refusals(folder, repo)
    with _named(repo, folder):
        _ = Checkpoint(folder).weight_files
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise UserError(f"model.path={repo}: no tokenizer (tokenizer.json, tokenizer.model or vocab.json)")
    return folder


def _refusals(folder: Path, repo: str) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={repo}: no config.json; is this repository a checkpoint?")
    with _named(repo, folder):
        _ = Checkpoint(folder).config


@contextmanager
def _named(repo: str, folder: Path) -> Iterator[None]:
    """What is wrong with the folder is told of the repository."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(folder), repo)) from None


def _weight_names(folder: Path) -> list[str]:
    """What the index names, without judging it; the judgement is that of `Checkpoint.weight_files`."""
    try:
        return indexed_names(folder)
    except UserError:
        return ["model.safetensors"]


def _download(repo: str, revision: str | None, names: list[str]) -> Path:
    """The snapshot's folder with these files, as far as the repository has them."""
    try:
        return snapshot(repo, revision, names)
    except Exception as error:
        raise _explained(error, repo, revision) from error


def snapshot(repo: str, revision: str | None, names: list[str], kind: str = "model", fetch: bool = True) -> Path:
    """The folder of a repository at a revision with the files that match `names`; unless `fetch`, of the cache alone.

    Whether it is there is asked first: for a list of its files the library would ask a missing network six times.
    """
    from huggingface_hub import HfApi, snapshot_download

    if fetch:
        HfApi().repo_info(repo, revision=revision, repo_type=kind)
    return Path(
        snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=names, local_files_only=not fetch)
    )


def _pickled(repo: str, commit: str) -> str | None:
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(repo, revision=commit)
    except Exception as error:
        raise _explained(error, repo, commit) from error
    return next((name for name in sorted(names) if name.endswith((".bin", ".pt", ".pth"))), None)


def _explained(error: Exception, repo: str, revision: str | None) -> Exception:
    """The user's mistake behind a failed request; what is none is returned as it is."""
    otherwise = (
        ", the cache of this machine lacks it, and there is no such folder here; connect, or fetch it elsewhere and "
        "name the folder"
    )
    message = explained(error, f"model.path={repo}", f"https://huggingface.co/{repo}", otherwise)
    if message is not None:
        return UserError(message)
    if is_due_to(error, "RevisionNotFoundError"):
        return UserError(f"model.path={repo}: the hub has no revision {revision} of it; see model.revision")
    if is_due_to(error, "RepositoryNotFoundError"):
        return UserError(
            f"model.path={repo}: no such folder here, and no such repository on the hub (a private one shows itself "
            "after: hf auth login)"
        )
    return error


def is_due_to(error: BaseException, *kinds: str) -> bool:
    """Whether the error, or one that led to it, is of a kind by its class's name; libraries wrap what the hub says."""
    return any(cls.__name__ in kinds for link in _causes(error) for cls in type(link).__mro__)


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


UNREACHABLE = ("LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError", "ConnectionError", "TimeoutError")
"""What a missing network shows as; TransportError is httpx's, which comes under more than one name."""


def explained(error: Exception, what: str, page: str, otherwise: str) -> str | None:
    """One line for what goes wrong between this machine and the hub, whatever is asked for; None for anything else.

    `what` opens the line; `page` is where access is asked for; `otherwise` says what to do without a network.
    """
    if is_due_to(error, "GatedRepoError"):
        return f"{what} is gated: accept its licence at {page}, then log in here with: hf auth login"
    if is_due_to(error, "RepositoryNotFoundError", "RevisionNotFoundError", "RevisionResolutionError"):
        return None
    if is_due_to(error, *UNREACHABLE):
        return f"{what}: the hub cannot be reached ({_reason(error)}){otherwise}"
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    answer = next((link for link in _causes(error) if isinstance(link, HfHubHTTPError)), None)
    if answer is None or isinstance(answer, EntryNotFoundError):
        return None
    status: Any = getattr(answer.response, "status_code", None)
    if status in (401, 403):
        return f"{what}: the hub refuses the token of this machine ({status}); log in again with: hf auth login"
    return f"{what}: the hub answered with an error ({status}); try again later"


def _reason(error: Exception) -> str:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    names = [type(link).__name__ for link in _causes(error)]
    return next((name for name in names if name != "LocalEntryNotFoundError"), names[0])
