"""Make a full checkpoint of a pruned, fine-tuned or merged student, which stock transformers opens.

python -m sdd.export ADDRESS FOLDER [--artifacts DIR] [--dtype bfloat16] [--source DIGEST=PATH] [--push OWNER/NAME]

A page of what it is goes with it. `--push` puts the folder on the Hugging Face hub, private unless `--public`.
"""

import argparse
import tempfile
from pathlib import Path

from sdd.architectures.configs import stated_dtype
from sdd.errors import UserError
from sdd.export.model_card import model_card
from sdd.models.checkpoints import Checkpoint, save_model
from sdd.models.hub import HUB_ID, PAGE, explained
from sdd.stages.runtime import Runtime
from sdd.stages.sources import add_arguments, runtime_of
from sdd.stages.student import base_of, open_student
from sdd.store import STAGES, Store, share
from sdd.untrusted import printable, tell_error

DTYPES = ("float32", "bfloat16", "float16")


def export(store: Store, address: str, target: Path, runtime: Runtime, dtype: str | None = None) -> Path:
    """Write the student into the new folder `target`; `dtype` is by default that of its checkpoint, or of its base."""
    source = store.find(address)
    if not STAGES[source.parent.name].is_model:
        raise UserError(f"{source.parent.name}/{source.name} is no model; export a pruned, tuned or merged artifact")
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; name a new folder")
    if target.parent.resolve().joinpath(target.name).is_relative_to(store.root.resolve()):
        raise UserError(f"{target} lies among the artifacts; name a folder elsewhere")
    base = base_of(source, runtime) if source.parent.name == "tuned" else Checkpoint(source)
    config = base.config
    kept = dtype or stated_dtype(config) or "float32"
    if kept not in DTYPES:
        raise UserError(f"{source.parent.name}/{source.name} has a dtype {printable(str(kept)[:40])}; choose --dtype")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be made: {error.strerror}") from None
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        folder = Path(temporary) / "checkpoint"
        model, _ = open_student(source, runtime, kept)
        save_model(model, folder, base)
        (folder / PAGE).write_text(model_card(store, source, runtime), encoding="utf-8")
        share(folder)
        if target.exists() or target.is_symlink():  # made meanwhile; a rename would replace an empty folder
            raise UserError(f"{target} exists; name a new folder")
        folder.rename(target)
    return target


def check_login(repo: str) -> None:
    """Refuse to begin what could not be pushed: a name that is none, nobody logged in, no network."""
    from huggingface_hub import get_token, whoami

    if not HUB_ID.fullmatch(repo):
        raise UserError(f"--push {repo}: write OWNER/NAME")
    if get_token() is None:
        raise UserError(f"--push {repo}: nobody is logged in here; run: hf auth login, or set HF_TOKEN")
    try:
        whoami()
    except Exception as error:
        raise _not_pushed(error, repo, "; connect and try again") from error


def push(folder: Path, repo: str, public: bool = False) -> str:
    """Upload a complete folder into the repository, made if it is not there; returns the address of its page."""
    from huggingface_hub import HfApi

    api = HfApi()
    later = f"{folder} is complete; upload it with: hf upload {repo} {folder}"
    try:
        url = str(api.create_repo(repo, private=not public, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Export of {folder.name}")
    except Exception as error:
        raise _not_pushed(error, repo, f"; {later}") from error
    return url


def _not_pushed(error: Exception, repo: str, otherwise: str) -> Exception:
    from huggingface_hub.errors import RepositoryNotFoundError

    message = explained(error, f"--push {repo}", f"https://huggingface.co/{repo}", otherwise)
    if message is not None:
        return UserError(message)
    if isinstance(error, RepositoryNotFoundError):
        return UserError(f"--push {repo}: no such repository, or this account may not write to it{otherwise}")
    return error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdd.export", description="Make a full checkpoint of a student.")
    parser.add_argument("address", help="address of a pruned, tuned or merged artifact")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face hub")
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        if arguments.push:
            check_login(arguments.push)
        store = Store(arguments.artifacts.absolute())
        print(export(store, arguments.address, arguments.folder, runtime_of(arguments), arguments.dtype))
        if arguments.push:
            print(push(arguments.folder, arguments.push, arguments.public))
    except UserError as error:
        return tell_error(error)
    return 0
