"""The command line: Hydra composes, the allow-list is checked, recipes are derived, the store is asked.

One function serves the four scripts. A job catches its own failure, writes `result.json` into its run folder and
returns, so that a sweep goes on; the exit code follows from what was recorded: 0, 2 if every failure is the user's
mistake, else 1.
"""

import contextlib
import errno
import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import hydra._internal.hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sdd.cli.config_files import config_folder
from sdd.cli.job import Job, typed
from sdd.cli.loader import CheckedConfigLoader
from sdd.cli.others import OtherJobs
from sdd.cli.progress import bars_into
from sdd.cli.words import arranged
from sdd.config import check_values
from sdd.config.nodes import quick_nodes
from sdd.errors import UserError
from sdd.forward.memory import is_short
from sdd.forward.nodes import Elsewhere, Nodes, place, together
from sdd.models.garbage import look_rarely
from sdd.models.panics import is_panic
from sdd.store.digests import write_atomically
from sdd.store.files import read_facts
from sdd.untrusted import printable

log = logging.getLogger(__name__)

USER, FAILURE = 2, 1


def main(script: str) -> None:
    """Run one of the scripts "prune", "generate", "train", "evaluate" on the process's command line."""
    flags = (word.split("=")[0] for word in sys.argv[1:])
    if any(len(word) > 2 and "--experimental-rerun".startswith(word) for word in flags):  # argparse takes short forms
        print("error: --experimental-rerun unpickles a file, which can run code; pass the overrides", file=sys.stderr)
        raise SystemExit(USER)
    hydra._internal.hydra.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]
    outcome.clear()
    try:
        sys.argv[1:] = arranged(sys.argv[1:])
    except UserError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        raise SystemExit(USER) from None
    with quick_nodes():
        hydra.main(config_path=str(config_folder()), config_name="config", version_base="1.3")(_task(script))()
    if outcome:
        raise SystemExit(max(outcome) if set(outcome) - {0, USER} == set() else FAILURE)


outcome: list[int] = []
"""Exit codes of this process's jobs; at the end of a sweep, of all its jobs."""


def _task(script: str) -> Callable[[DictConfig], float | None]:
    def task(config: DictConfig) -> float | None:
        """What a sweeper that searches (Optuna) makes better: an evaluation's average; None where there is none."""
        return measure(HydraConfig.get().runtime.output_dir) if run_job(script, config) == 0 else None

    task.__module__ = f"sdd.{script}"  # Hydra names the job after it
    return task


def run_job(script: str, config: DictConfig) -> int:
    """One job: print the artifact's path on stdout, or one line of error on stderr; record either."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    record: dict[str, Any] = {"script": script, "overrides": typed()}
    code = 0
    try:
        record |= make(script, config, folder)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        code, message = explained(error)
        record["error"], record["code"] = message, code
        print(f"error: {message}", file=sys.stderr)
        if code == FAILURE or HydraConfig.get().verbose:
            traceback.print_exc()
    with contextlib.suppress(OSError):
        write_atomically(folder / "result.json", json.dumps(record, indent=1) + "\n")
    outcome.append(code)
    return code


def measure(run_folder: str) -> float | None:
    """The average, 0 to 1, of what a job evaluated."""
    try:
        record = read_facts(Path(run_folder) / "result.json", {"stage?": str, "path?": str})
        if record.get("stage") != "evaluated":
            return None
        average: float | None = read_facts(Path(record["path"]) / "results.json", {"average": (float, None)})["average"]
    except (UserError, OSError):
        return None
    return average


def explained(error: BaseException) -> tuple[int, str]:
    """(exit code, one line) for an exception; a full disk is the user's to mend, wherever it is noticed."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left on device" in str(error) or "os error 28" in str(error):
        path = (error.filename2 or error.filename) if isinstance(error, OSError) else None  # a copy names both
        where = f" at {path}" if path else ""
        return USER, f"the disk is full{where}; free space and run the same command again, finished work is kept"
    kind = type(error).__name__
    if is_short(error):
        return USER, (
            "out of memory; ask for less at once: trainer.micro_batch_tokens or trainer.gradient_checkpointing=true in "
            "fine-tuning, engine.batch_size, evaluation.batch_size or trainer.inference_batch_size elsewhere"
        )
    if isinstance(error, Elsewhere):
        return error.code, printable(str(error))
    if isinstance(error, UserError):
        return USER, printable(" ".join(str(error).split()))
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return USER, printable(f"{error.strerror}: {str(error.filename)[:200]}")
    first = (str(error).splitlines() or [""])[0]
    if is_panic(error):
        return USER, printable(f"the tokenizer gives up on a text ({first[:200]}); use another tokenizer.json")
    return FAILURE, printable(f"{kind}: {first}")


def make(script: str, config: DictConfig, run_folder: Path) -> dict[str, Any]:
    """Check the config, derive the recipe, and have it built; what the job's record says of it."""
    with _nodes(config) as nodes:
        return _made(script, config, run_folder, nodes)


def _nodes(config: DictConfig) -> contextlib.AbstractContextManager[Nodes | None]:
    """The commands of all machines that do this job together, once they have come."""
    trainer = config.trainer
    if trainer.num_nodes == 1 or config.dry_run or config.fetch:
        return contextlib.nullcontext()
    check_values(config)
    if str(HydraConfig.get().launcher._target_).endswith("JoblibLauncher"):
        raise UserError("trainer.num_nodes: its jobs come one after another; leave out hydra/launcher=joblib")
    return together(place(trainer.num_nodes, trainer.devices), explained)


def _made(script: str, config: DictConfig, run_folder: Path, nodes: Nodes | None) -> dict[str, Any]:
    job = Job(config, typed(), run_folder, nodes)
    wanted = job.wanted(script)
    if config.dry_run:
        job.fit(job.store(script).missing(wanted) if wanted else [])
        plan = print_plan(wanted, job.study, job.store(script))
        return {"dry_run": True, "finetune": job.choices.get("finetune"), "plan": plan}
    look_rarely()  # libraries are imported now
    if config.fetch:
        job.fetch(wanted)
        return {"fetched": True}
    if wanted is None:
        folder = job.study.models.checkpoint.folder
        print(folder, flush=True)
        return {"stage": "model", "path": str(folder)}
    is_sweep, is_first = HydraConfig.get().mode == RunMode.MULTIRUN, nodes is None or nodes.is_first
    with bars_into(run_folder) if is_sweep and is_first else contextlib.nullcontext():
        others = OtherJobs(script, run_folder).advance if is_sweep and nodes is None else lambda: False
        path = job.build(wanted, script, others)
    from sdd.cli.endings import ending

    number = HydraConfig.get().job.num if is_sweep else None
    for line in ending(wanted, job.study, job.store(script), sys.argv[1:], number):
        print(line, file=sys.stderr)
    print(path, flush=True)
    return {"stage": wanted.stage, "address": wanted.address, "path": str(path)}


def print_plan(wanted: Any, study: Any, store: Any) -> list[dict[str, Any]]:
    """The graph of artifacts, inputs first, each with whether it exists and what it takes; on stdout, as asked for."""
    if wanted is None:
        print("nothing to build: the unpruned model itself")
        return []
    from sdd.stages.dry_run import PRICED, assumption, lines, planned, summary

    plan = planned(wanted, study, store)
    print("\n".join(lines(plan)))
    records = [artifact.record() for artifact in plan]
    log.info(summary(records))
    log.info(assumption(study.config.trainer.accelerator))
    if any(artifact.price for artifact in plan):
        log.info(PRICED)
    if any(artifact.provisional for artifact in plan):
        log.info("addresses with a question mark are known once the model and the data have been fetched")
    return records


def prune() -> None:
    main("prune")


def generate() -> None:
    main("generate")


def train() -> None:
    main("train")


def evaluate() -> None:
    main("evaluate")
