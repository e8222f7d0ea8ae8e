"""The end of a multirun: which jobs failed, the exit code, and the report of what was evaluated."""

import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from sdd.cli.progress import Progress, number_of_jobs
from sdd.cli.workers import watched_workers
from sdd.config.checks import LOGGER_SETTINGS
from sdd.errors import UserError
from sdd.forward.nodes import place
from sdd.untrusted import ANY, check_shape, printable, read_json, read_text

RECORD = {
    "overrides": [str],
    "error?": str,
    "code?": int,
    "stage?": str,
    "path?": str,
    "plan?": [ANY],
}
"""What a job says of itself in `result.json`."""
WORKERS = (2, 4, 8)
"""How many workers a dry run of a sweep counts for."""
LARGEST = 4 << 20
"""Bytes of a job's record or config."""

log = logging.getLogger(__name__)


class SweepEnd(Callback):
    """A Hydra callback. Reads the jobs' records, so that it does not matter which process ran them.

    `report`: whether what was evaluated is written up at the end; takes seconds that a report above sweeps pays anyway.
    """

    def __init__(self, report: bool = True) -> None:
        self.report = report
        self.earlier: set[tuple[Path, int]] = set()
        self.progress: Progress | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the records that an earlier sweep left in the same folder, and begin to tell how far this one is;
        have joblib's workers, if there will be any, end with this process."""
        if str(config.hydra.launcher._target_).endswith("JoblibLauncher"):
            watched_workers()
        folder = Path(config.hydra.sweep.dir)
        self.earlier = set(_records(folder))
        self.progress = Progress(folder, number_of_jobs(config))
        self.progress.start()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """What is asked of a job is in its folder: a sweep would keep two copies of every config to its end."""
        job_return.cfg = job_return.hydra_cfg = None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from sdd.cli import app

        if self.progress:
            self.progress.stop()
        folder = Path(config.hydra.sweep.dir)
        names = {str(p.parent.relative_to(folder)): p for p, _ in set(_records(folder)) - self.earlier}
        jobs = [(name, _record(names[name])) for name in sorted(names, key=lambda n: (len(n), n))]
        failed = [(name, job) for name, job in jobs if "error" in job]
        app.outcome[:] = [job.get("code", 0) for _, job in jobs]
        if failed:
            print(f"{len(failed)} of {len(jobs)} jobs failed:", file=sys.stderr)
            for name, job in failed:
                print(printable(f"  #{name} {' '.join(job['overrides'])}: {job['error']}"), file=sys.stderr)
        plans = [record for _, job in jobs for record in job.get("plan", [])]
        if plans:
            from sdd.planning.requirements import duration
            from sdd.planning.side_by_side import seconds_of
            from sdd.stages.dry_run import by_gpu, by_way, summary

            log.info("the whole sweep: %s", summary(plans))
            steps = [
                [(one["artifact"], 0.0 if one["exists"] else one["seconds"]) for one in job.get("plan", [])]
                for _, job in jobs
            ]
            times = ", ".join(f"{duration(seconds_of(steps, workers))} by {workers}" for workers in WORKERS)
            log.info("by several workers, each with a device of its own: about %s", times)
            ways = [(str(job.get("finetune")), job["plan"]) for _, job in jobs if "plan" in job]
            for line in [*by_gpu(plans), *by_way(ways)]:
                log.info(line)
        evaluated = [Path(job["path"]) for _, job in jobs if job.get("stage") == "evaluated"]
        if not evaluated or not self.report or not is_first(config.trainer):
            return
        from sdd.report import write_report

        unique = list(dict.fromkeys(evaluated))
        try:
            report = write_report(unique, unique[0].parent.parent, folder / "report")
        except Exception:
            log.exception("the report of the sweep could not be written; the artifacts are complete")
            app.outcome.append(app.FAILURE)
            return
        log.info("report: %s", report)
        trackers = [_tracker(names[name].parent) for name, job in jobs if job.get("stage") == "evaluated"]
        tracker = next((tracker for tracker in trackers if tracker), None)
        if report and tracker:
            from sdd.cli.job import check_tracker
            from sdd.report.tracking import log_report

            try:
                check_tracker(tracker)
                log_report(report, [path.name for path in unique], tracker)
            except Exception:
                log.exception("the report was written, but could not be logged")
                app.outcome.append(app.FAILURE)


def is_first(trainer: Any) -> bool:
    """Whether this command is alone, or the first node's."""
    nodes = place(trainer.num_nodes, trainer.devices) if trainer.num_nodes > 1 else None
    return nodes is None or nodes.node == 0


def _tracker(folder: Path) -> dict[str, Any] | None:
    """The tracker that the job of a run folder was composed with, if any; it has what each job overrode.

    Taken as it is written, nothing in it resolved: a setting that refers to anything else is left out.
    """
    file = folder / ".hydra" / "config.yaml"
    if not file.is_file():
        return None
    try:
        composed: Any = yaml.safe_load(read_text(file, f"{file}", LARGEST))
    except (UserError, yaml.YAMLError, RecursionError, ValueError) as error:
        log.warning("%s cannot be read: %s", printable(str(file)), printable(str(error).splitlines()[0]))
        return None
    logger: Any = composed.get("logger") if isinstance(composed, dict) else None
    if not isinstance(logger, dict) or not _literal(logger.get("_target_")):
        return None
    return {name: logger[name] for name in LOGGER_SETTINGS if name in logger and _literal(logger[name])}


def _literal(value: Any) -> bool:
    """Whether a setting of the tracker's is a plain value, or a list of such, that refers to nothing."""
    if isinstance(value, list):
        return all(map(_literal, value))
    return isinstance(value, bool | int | float) or (isinstance(value, str) and "${" not in value)


def _record(path: Path) -> dict[str, Any]:
    """A job's record; one that cannot be read counts as a job that failed."""
    try:
        record = read_json(path, f"{path}", LARGEST)
        check_shape(record, RECORD, f"{path}")
    except UserError as error:
        return {"overrides": [], "error": str(error), "code": 1}
    return record


def _records(folder: Path) -> list[tuple[Path, int]]:
    return [(path, path.lstat().st_mtime_ns) for path in folder.rglob("result.json")]
