"""Find what manifests name by digest: the embedded model on its own, everything else from `--source DIGEST=PATH`."""

import argparse
from pathlib import Path
from typing import Any

import sdd
from sdd.errors import UserError
from sdd.models.checkpoints import Checkpoint
from sdd.models.hub import checkpoint_folder, is_hub_id
from sdd.models.served import Server
from sdd.stages.runtime import Runtime

TEACHER = Path(sdd.__file__).resolve().parent / "tiny" / "teacher"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"), help="the folder of artifacts")
    parser.add_argument(
        "--source", action="append", default=[], metavar="DIGEST=PATH", help="a model (folder or hub id) or data file"
    )
    parser.add_argument("--server", metavar="URL", help="the server that rewrote, answered or wrote rollouts")


def runtime_of(arguments: argparse.Namespace, **settings: Any) -> Runtime:
    """A runtime on this machine's CPU that knows the embedded model and the sources given."""
    memory = arguments.artifacts / ".digests"
    sources = {Checkpoint(TEACHER).digest(memory): TEACHER}
    for given in arguments.source:
        digest, separator, path = given.partition("=")
        if not separator or not digest:
            raise UserError(f"--source {given}: write DIGEST=PATH")
        folder = checkpoint_folder(path, None) if is_hub_id(path) else Path(path)
        if not folder.exists():
            raise UserError(f"--source {given}: no such path")
        sources[digest] = folder
    servers: dict[str, Server] = {}
    if arguments.server:
        servers = {group: Server(arguments.server, group=group) for group in ("engine", "evaluation", "rollouts")}
    return Runtime(sources=sources, servers=servers, **settings)
