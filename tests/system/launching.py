"""Run the four scripts as their user does: in this process (quick), or in a process of its own that can be killed.

A process of its own is forked from a server that has imported the libraries once, so that it starts at once; its
standard streams are real files. `hold` makes such a process stop in the middle of building a stage, say so by a file
`holding-<stage>`, and wait for a file `go`; "gpu" is where a job asks whether there is one.
"""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARIES = ["sdd.cli.app", "torch", "transformers", "peft", "pytorch_lightning", "datasets", "lm_eval.evaluator"]
LIBRARIES += ["lm_eval.models.huggingface", "sdd.finetuning.module", "sdd.evaluation.harness", "sdd.stages.figures"]
PATIENCE = 300.0
"""Seconds after which a process that should have ended or reported counts as stuck; never waited for otherwise."""


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and its two streams."""

    code: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        return self.stdout.splitlines()

    @property
    def path(self) -> Path:
        """The artifact's folder: the one line on stdout of a command that succeeded."""
        assert self.code == 0, self.stderr
        assert len(self.lines) == 1, self.stdout
        return Path(self.lines[0])

    @property
    def built(self) -> list[str]:
        """The artifacts that the command began to build, as stage/address."""
        return re.findall(r"building ([a-z]+/[0-9a-f]+)$", self.stderr, re.M)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


@contextlib.contextmanager
def _as_command(script: str, words: tuple[str, ...], cwd: Path) -> Iterator[None]:
    """Command line and working directory of a script; logging as it was before."""
    root, argv = logging.getLogger(), sys.argv
    handlers, level, here = root.handlers[:], root.level, Path.cwd()
    cwd.mkdir(parents=True, exist_ok=True)
    os.chdir(cwd)
    sys.argv = [f"{script}.py", *words]
    try:
        yield
    finally:
        sys.argv = argv
        os.chdir(here)
        root.handlers[:] = handlers
        root.setLevel(level)


def run(script: str, *words: str, cwd: Path) -> Outcome:
    """The script in this process, with its exit code and captured streams."""
    from hydra.core.global_hydra import GlobalHydra

    from sdd.cli import app

    out, err, code = io.StringIO(), io.StringIO(), 0
    with _as_command(script, words, cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        GlobalHydra.instance().clear()
        try:
            app.main(script)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def job(script: str, config: Any, cwd: Path) -> Outcome:
    """One job of the script on a composed config (`hydra` node included), without the command line around it."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    from sdd.cli import app

    folder = cwd / "outputs"
    folder.mkdir(parents=True)
    with open_dict(config):
        config.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(config)
    with open_dict(config):
        del config.hydra
    out, err = io.StringIO(), io.StringIO()
    with _as_command(script, (), cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = app.run_job(script, config)
    HydraConfig.instance().cfg = None
    return Outcome(code, out.getvalue(), err.getvalue())


def subprocess_run(command: list[str], cwd: Path, **environment: str) -> Outcome:
    """A command line run by this Python, from the outside."""
    cwd.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def spawn(script: str, *words: str, cwd: Path, name: str = "process", hold: str | None = None) -> "Running":
    """The script in a process of its own; `hold` names the stage in the middle of which it stops and waits."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(LIBRARIES)
    cwd.mkdir(parents=True, exist_ok=True)
    process = server.Process(target=_child, args=(script, words, cwd, name, hold, dict(os.environ)))
    process.start()
    return Running(process, cwd, name)


@dataclass
class Running:
    process: Any
    cwd: Path
    name: str

    def until(self, reached: Callable[[], bool]) -> None:
        """Wait until something holds; the process must not end before."""
        deadline = time.monotonic() + PATIENCE
        while not reached():
            assert self.process.is_alive(), f"{self.name} ended too early: {self.stream('stderr')}"
            assert time.monotonic() < deadline, f"{self.name} is stuck: {self.stream('stderr')}"
            time.sleep(0.02)

    def until_holding(self, stage: str) -> None:
        self.until((self.cwd / f"holding-{stage}").exists)

    def kill(self) -> None:
        """SIGKILL to the process and all it started."""
        os.killpg(self.process.pid, 9)
        self.process.join(PATIENCE)

    def outcome(self) -> Outcome:
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"{self.name} is stuck"
        return Outcome(self.process.exitcode, self.stream("stdout"), self.stream("stderr"))

    def stream(self, name: str) -> str:
        path = self.cwd / f"{self.name}.{name}"
        return path.read_text() if path.exists() else ""


def _child(
    script: str, words: tuple[str, ...], cwd: Path, name: str, hold: str | None, environment: dict[str, str]
) -> None:
    os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(environment)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        target = os.open(cwd / f"{name}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.chdir(cwd)
    sys.argv = [f"{script}.py", *words]
    code = 1
    try:
        from sdd.cli import app

        if hold:
            _hold_in(hold)
        app.main(script)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _hold_in(stage: str) -> None:
    """Make the builder of `stage` stop half-way, after what it would continue from has been written."""
    import torch
    from pytorch_lightning.plugins.io import TorchCheckpointIO

    from sdd.finetuning import module
    from sdd.stages import evaluated, pruned, rewrites, scores, targets

    def wait() -> None:
        Path(f"holding-{stage}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        while not Path("go").exists():
            time.sleep(0.02)

    def wait_before(owner: Any, function: str, times: int = 1) -> None:
        original, seen = getattr(owner, function), [0]

        def waiting(*args: Any, **named: Any) -> Any:
            seen[0] += 1
            if seen[0] == times:
                wait()
            return original(*args, **named)

        setattr(owner, function, waiting)

    def wait_within_checkpoint(number: int) -> None:
        original, seen = TorchCheckpointIO.save_checkpoint, [0]

        def half(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            seen[0] += 1
            if seen[0] == number:
                Path(path).write_bytes(b"half a check")
                wait()
            original(self, checkpoint, path, storage_options)

        TorchCheckpointIO.save_checkpoint = half

    places = {
        "checkpoint": lambda: wait_within_checkpoint(3),
        "scores": lambda: wait_before(scores, "heat_map"),
        "pruned": lambda: wait_before(pruned, "write_json"),
        "rewrites": lambda: wait_before(rewrites, "write_jsonl", times=2),
        "targets": lambda: wait_before(targets, "write_json"),
        "tuned": lambda: wait_before(module.StudentModule, "_record", times=4),
        "evaluated": lambda: wait_before(evaluated, "write_jsonl", times=2),
        "gpu": lambda: wait_before(torch.cuda, "is_available"),
    }
    places[stage]()


def files_of(root: Path) -> dict[str, str]:
    """Digests of the files of all complete artifacts under a folder, manifests left out; by stage/address/name."""
    return {
        f"{name}/{file}": digest
        for name, manifest in artifacts_of(root).items()
        for file, digest in manifest["files"].items()
    }


def artifacts_of(root: Path) -> dict[str, dict[str, Any]]:
    """The manifest of every complete artifact under a folder, by stage/address."""
    paths = sorted(root.glob("[a-z]*/*/manifest.json"))
    return {f"{path.parent.parent.name}/{path.parent.name}": json.loads(path.read_text()) for path in paths}
