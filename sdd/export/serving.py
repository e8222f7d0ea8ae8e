"""Serve a model as long as a command runs, by a server with OpenAI's interface.

    sdd serve ADDRESS|FOLDER|OWNER/NAME [--program vllm] [--draft STUDENT] [-- COMMAND ... {url} ... {model} ...]

A fine-tuned student is made into a checkpoint first, in a temporary folder. Without a command the server runs until it
is interrupted. With vLLM, `--draft` names a student that drafts for the model served: speculative decoding.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from sdd.errors import UserError
from sdd.export.checkpoint import export
from sdd.models.hub import checkpoint_folder, is_hub_id
from sdd.stages.sources import add_arguments, runtime_of
from sdd.store import STAGES, Store
from sdd.untrusted import expanded, printable, tell_error

PROGRAMS = ("transformers", "vllm")
GRACE = 20.0
"""Seconds that a server has to end by itself."""
POLL = 0.1


def checkpoint_for(name: str, arguments: argparse.Namespace, scratch: Path) -> Path:
    """The folder of a whole checkpoint: a folder's, a hub id's, or an artifact's; that of an adapter is made."""
    given = expanded(name)
    if given.is_dir():
        return given.resolve()
    if is_hub_id(name) and name.partition("/")[0] not in STAGES:
        return checkpoint_folder(name, None)
    store = Store(arguments.artifacts.absolute())
    artifact = store.find(name)
    stage = artifact.parent.name
    if not STAGES[stage].is_model:
        raise UserError(f"{stage}/{artifact.name} is no model; name a pruned, tuned or merged artifact")
    if stage != "tuned":
        return artifact
    return export(store, name, scratch / artifact.name, runtime_of(arguments), arguments.dtype)


def server_command(
    program: str, model: Path, host: str, port: int, dtype: str | None, draft: Path | None, draft_tokens: int
) -> list[str]:
    """What starts a server; its arguments are those of `vllm serve` 0.32, and of `transformers serve` 5."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        extra = "vllm" if program == "vllm" else "'sdd[server]'"
        raise UserError(f"--program {program}: there is no such program; run: pip install {extra}")
    words = [found, "serve", str(model), "--host", host, "--port", str(port)]
    if dtype is not None:
        words += ["--dtype", dtype]
    if draft is None:
        return words
    if program != "vllm":
        raise UserError("--draft needs --program vllm, which lets one model draft for another")
    settings = {"model": str(draft), "num_speculative_tokens": draft_tokens}
    return [*words, "--speculative-config", json.dumps(settings)]


@contextlib.contextmanager
def serving(command: Sequence[str], url: str, seconds: float, log: Path) -> Iterator[None]:
    """A server, from when it says that it is well until the block ends; it and all it started then end too.

    Where it has ended before, that is told, and its last words.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + seconds
        while not _is_well(url):
            if process.poll() is not None:
                raise UserError(f"{command[0]} ended with code {process.returncode}: {_last_line(log)}")
            if time.monotonic() > deadline:
                raise UserError(f"{command[0]} does not answer after {seconds:g} seconds: {_last_line(log)}")
            time.sleep(POLL)
        yield
        if process.poll() is not None:
            print(f"{command[0]} ended with code {process.returncode}: {_last_line(log)}", file=sys.stderr)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):  # also what outlives it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_well(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _last_line(log: Path) -> str:
    lines = log.read_bytes()[-4000:].decode(errors="replace").split("\n")
    return printable(next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")[:300])


def free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        port: int = free.getsockname()[1]
        return port


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def serve(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Serve until the command ends, with its exit code; without one, until interrupted."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _serve(arguments, words)
    except KeyboardInterrupt:
        return 130 if words else 0
    finally:
        signal.signal(signal.SIGTERM, before)


def _serve(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="sdd-serve-") as temporary:
        scratch = Path(temporary)
        model = checkpoint_for(arguments.model, arguments, scratch)
        draft = None if arguments.draft is None else checkpoint_for(arguments.draft, arguments, scratch)
        port = arguments.port or free_port(arguments.host)
        where = f"http://{arguments.host}:{port}"
        how = arguments.host, port, arguments.dtype, draft, arguments.draft_tokens
        command = server_command(arguments.program, model, *how)
        with serving(command, where, arguments.wait, scratch / "log"):
            print(f"{where}/v1 serves {model}", file=sys.stderr, flush=True)
            if not words:
                print(f"{where}/v1", flush=True)
                signal.pause()
            filled = [word.replace("{url}", f"{where}/v1").replace("{model}", str(model)) for word in words]
            try:
                return subprocess.run(filled, check=False).returncode
            except FileNotFoundError as error:
                raise UserError(f"{printable(str(error.filename))}: no such command") from None


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    at = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(prog="sdd serve", description="Serve a model as long as a command runs.")
    parser.add_argument("model", help="address of a pruned, tuned or merged artifact, a folder, or a hub id")
    parser.add_argument("--program", choices=PROGRAMS, default="transformers")
    parser.add_argument("--draft", metavar="MODEL", help="with vllm: who drafts for the model, named as it is")
    parser.add_argument("--draft-tokens", type=int, default=4, help="tokens drafted at a time")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="by default one that is free")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--wait", type=float, default=600.0, help="seconds until it must answer")
    add_arguments(parser)
    try:
        return serve(parser.parse_args(given[:at]), given[at + 1 :])
    except UserError as error:
        return tell_error(error)
