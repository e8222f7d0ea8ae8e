"""The end of a multirun: which jobs failed, the exit code, and the report of what was evaluated."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class SweepEnd(Callback):
    """A Hydra callback. Reads the jobs' records, so that it does not matter which process ran them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from sdd import app

        folder = Path(config.hydra.sweep.dir)
        paths = sorted(folder.glob("*/result.json"), key=lambda path: (len(path.parent.name), path.parent.name))
        jobs = [(path.parent.name, json.loads(path.read_text())) for path in paths]
        failed = [(name, job) for name, job in jobs if "error" in job]
        app.outcome[:] = [job.get("code", 0) for _, job in jobs]
        if failed:
            print(f"{len(failed)} of {len(jobs)} jobs failed:", file=sys.stderr)
            for name, job in failed:
                print(f"  #{name} {' '.join(job['overrides'])}: {job['error']}", file=sys.stderr)
        evaluated = [Path(job["path"]) for _, job in jobs if job.get("stage") == "evaluated"]
        if not evaluated:
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
