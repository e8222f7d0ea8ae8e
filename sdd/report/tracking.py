"""The report as a run of an experiment tracker: its table and its figures, under an id that names what it rests on."""

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdd.config.allowed import build
from sdd.config.parts import TENSORBOARD


def run_id(addresses: Iterable[str]) -> str:
    """The same for the same evaluated artifacts, so that a sweep that is run again goes into the same run."""
    return f"report-{hashlib.sha256(' '.join(sorted(addresses)).encode()).hexdigest()[:16]}"


def log_report(report: Path, addresses: list[str], logger: dict[str, Any]) -> None:
    """Log table and figures of a written report with the configured tracker."""
    name = run_id(addresses)
    if logger["_target_"] == TENSORBOARD:
        _log_events(report, name, logger)
        return
    import wandb

    if any((report / "wandb").glob(f"*run-*-{name}")):
        return  # already here, perhaps not yet uploaded
    with (report / "table.csv").open(encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    settings = {"evaluated": sorted(addresses)}
    tracker = build(logger, id=name, name="report", job_type="report", save_dir=str(report), config=settings)
    figures = {path.stem: wandb.Image(str(path)) for path in sorted(report.glob("*.png"))}
    tracker.experiment.log({"table": wandb.Table(columns=columns, data=rows), **figures})
    tracker.experiment.finish()


def _log_events(report: Path, name: str, logger: dict[str, Any]) -> None:
    from matplotlib.image import imread

    if (report / "tensorboard" / name).exists():
        return
    tracker = build(logger, save_dir=str(report), name="tensorboard", version=name)
    tracker.experiment.add_text("table", (report / "table.md").read_text(encoding="utf-8"))
    for path in sorted(report.glob("*.png")):
        tracker.experiment.add_image(path.stem, imread(path), dataformats="HWC")
    tracker.finalize("success")
