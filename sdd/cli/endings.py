"""What a job came to, in a few lines for stderr: read from the artifact that it asked for, once that is there.

A cut says what went and what comes next; an evaluation is a small table beside the unpruned model's, where the store
has that; training and rewriting are a line each. stdout stays the artifact's path. Jobs of a sweep say one line.
"""

import logging
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdd.cli.words import command
from sdd.errors import UserError
from sdd.report.collect import CUT, SUMMARY, read_results, spans
from sdd.store import Recipe, Store
from sdd.store.files import check_file, read_facts
from sdd.study import Study
from sdd.untrusted import printable, read_text

log = logging.getLogger(__name__)

SIZES = CUT | {"kind?": str, "width_before?": int, "width_after?": int}


def ending(wanted: Recipe, study: Study, store: Store, words: Sequence[str], job: int | None) -> list[str]:
    """Lines about an artifact that was asked for in `words` of a command line; none where nothing can be read of it.

    `job` is its number in a sweep, None outside of one.
    """
    tellers: dict[str, Callable[[Path], list[str]]] = {
        "pruned": lambda folder: [*cut_lines(folder), *_next_commands(words)],
        "targets": lambda folder: targets_lines(folder, "rewrites" in wanted.inputs),
        "tuned": training_lines,
        "evaluated": lambda folder: _evaluated(folder, wanted, study, store, words),
    }
    tell = tellers.get(wanted.stage)
    try:
        lines = tell(store.folder(wanted)) if tell else []
    except (UserError, OSError) as error:
        log.warning("what this came to cannot be read: %s", printable(str(error)))
        return []
    return [printable(line) for line in (lines if job is None else [f"#{job} {line}" for line in lines[:1]])]


def _plural(noun: str, several: Sequence[Any]) -> str:
    return noun if len(several) == 1 else f"{noun}s"


# ---- a cut ----------------------------------------------------------------------------------------------------------


def cut_lines(folder: Path) -> list[str]:
    """What was cut, and what it saves."""
    cut = read_facts(folder / "pruning.json", SIZES)
    removed, kept = cut.get("removed_blocks") or [], cut.get("kept_blocks") or []
    parts = []
    if removed:
        parts.append(f"{_plural('block', removed)} {spans(removed)} of {len(removed) + len(kept)} (counted from 0)")
    if "width_before" in cut and "width_after" in cut:
        before, after = cut["width_before"], cut["width_after"]
        parts.append(f"{before - after} of {before} channels of every MLP")
    metric = f", chosen by {cut['metric']}" if cut.get("metric") else ""
    lines = [f"removed {' and '.join(parts) or 'nothing'}{metric}"]
    before, after = cut.get("parameters_before"), cut.get("parameters_after")
    if before and after is not None:
        share = f"{100 * (1 - after / before):.1f}%"
        lines.append(f"saves {share} of the parameters, {before:,} -> {after:,}, and about as much of a token's work")
    return lines


def _next_commands(words: Sequence[str]) -> list[str]:
    """What the cut cost, and how to get quality back."""
    shared = [word for word in words if _name(word) not in ("finetune", "dry_run", "fetch")]
    cost, back = command("evaluate", [*shared, "finetune=none"]), command("train", [*shared, "finetune=self_distill"])
    return [f"next, what the cut cost: {cost}", f"next, to get quality back: {back}"]


def _name(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


# ---- rewriting and training -----------------------------------------------------------------------------------------


def targets_lines(folder: Path, are_rewritten: bool) -> list[str]:
    """How many rows there are, and how many of them the unpruned model rewrote."""
    summary = read_facts(folder / "summary.json", SUMMARY | {"rows": int, "judged?": {"asked": int, "unread": int}})
    reasons = summary.get("reasons", {})
    if not are_rewritten:
        return [f"{summary['rows']:,} rows, as they are"]
    others = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in reasons.items() if name != "ok")
    kept = f"{reasons.get('ok', 0):,} of {summary['rows']:,} rewrites kept"
    lines = [f"{kept}; the reference stayed in the others: {others}" if others else kept]
    if judged := summary.get("judged"):
        unread = f"; {judged['unread']:,} answers were no choice, and the first try stands" if judged["unread"] else ""
        lines.append(f"a judge was asked to choose in {judged['asked']:,} rows{unread}")
    return lines


def training_lines(folder: Path) -> list[str]:
    """Steps, the loss at both ends, and the last loss on validation rows."""
    path = folder / "history.csv"
    check_file(path, folder)
    header, *rows = (line.split(",") for line in read_text(path, f"{path}").splitlines())
    records = [dict(zip(header, row, strict=False)) for row in rows]
    if not records:
        return []
    losses = [record.get("loss", "") for record in records]
    validation = [record["validation_loss"] for record in records if record.get("validation_loss")]
    line = f"{len(records):,} steps: loss {_short(losses[0])} -> {_short(losses[-1])}"
    return [line + (f", on validation rows {_short(validation[0])} -> {_short(validation[-1])}" if validation else "")]


def _short(number: str) -> str:
    try:
        return f"{float(number):.3f}"
    except ValueError:
        raise UserError(f"history.csv holds {number[:40]!r}, which is no number") from None


# ---- an evaluation --------------------------------------------------------------------------------------------------


ASKING = ("model", "evaluation", "trainer", "paths", "experiment")
"""Groups of settings that the unpruned model's evaluation shares with a student's."""


def _evaluated(folder: Path, wanted: Recipe, study: Study, store: Store, words: Sequence[str]) -> list[str]:
    """The averages, then a table of tasks beside the unpruned model's evaluation, or how to get that."""
    if "model" not in wanted.inputs:
        return evaluation_lines(folder, None)
    from sdd.stages import evaluated

    same = evaluated.recipe(study, None)
    if store.has(same):
        return evaluation_lines(folder, store.folder(same))
    shared = [word for word in words if word.startswith("--config") or _name(word).partition(".")[0] in ASKING]
    unpruned = command("evaluate", [*shared, "pruning=none", "finetune=none"])
    return [*evaluation_lines(folder, None), f"what that is of the unpruned model: {unpruned}"]


def evaluation_lines(folder: Path, teacher: Path | None) -> list[str]:
    """The averages, then a table of tasks: percent, standard error, and what share of the unpruned model's it is."""
    results = read_results(folder / "results.json")
    of_teacher = {} if teacher is None else read_results(teacher / "results.json")["tasks"]
    tasks = {name: task for name, task in results["tasks"].items() if task.get("value") is not None}
    bases = {name: task["value"] for name, task in of_teacher.items() if task.get("value") is not None}
    if not tasks:
        return []
    rows = [["task", "percent", "std. error", "unpruned", "kept"]]
    for name, task in tasks.items():
        error, base = task.get("stderr"), bases.get(name)
        row = [name, f"{100 * task['value']:.1f}", "-" if error is None else f"{100 * error:.1f}"]
        row += ["-" if base is None else f"{100 * base:.1f}", f"{100 * task['value'] / base:.0f}%" if base else "-"]
        rows.append(row)
    used = len(rows[0]) if bases else 3
    widths = [max(len(row[place]) for row in rows) for place in range(used)]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(row[place].rjust(widths[place]) for place in range(1, used))])
        for row in rows
    ]
    likelihood = (results.get("likelihood") or {}).get("nll")
    return [_average(tasks, bases) + (f"; {likelihood['value']:.3f} nats a token" if likelihood else ""), *table]


def _average(tasks: dict[str, Any], bases: dict[str, float]) -> str:
    """'average 88.1 percent over 8 tasks, 93.4% of the unpruned model's 94.3'."""
    mean = statistics.fmean(task["value"] for task in tasks.values())
    line = f"average {100 * mean:.1f} percent over {len(tasks)} {_plural('task', list(tasks))}"
    whole = statistics.fmean(bases[name] for name in tasks) if tasks.keys() <= bases.keys() else 0.0
    return line + (f", {100 * mean / whole:.1f}% of the unpruned model's {100 * whole:.1f}" if whole else "")
