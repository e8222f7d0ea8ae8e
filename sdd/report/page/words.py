"""The sections of text and tables: what was compared, the arms, their differences, and how each number was made."""

import json
from typing import Any

from sdd.report.arms import COLUMNS, DIGEST, Arm, text_of
from sdd.report.collect import flatten, spans
from sdd.report.findings import findings
from sdd.report.library import Artifact
from sdd.report.next_steps import next_steps
from sdd.report.page.cells import cell, columns, line_of, plain, table
from sdd.report.page.section import Section, Subject, render
from sdd.report.tables import METHOD, PRICE, evaluation_of, hidden_damage, own_settings, pairs_of, priced
from sdd.store import STAGES

ORDER = list(STAGES)
MOST_CONTRASTS = 300
MOST_VALUES = 12
MOST_SENTENCES = 8
"""Of the findings before the rest is folded; the last, on what they rest, is always there."""
DIMENSIONS = {"mode": "mode", "pruning": "size", "metric": "metric", "dataset": "dataset"}
"""What the page filters by; `size` is the name of the pruning."""


def dimensions(arm: Arm) -> dict[str, str | None]:
    run = arm.run
    return {"mode": arm.mode, "pruning": run.pruning, "metric": run.metric, "dataset": run.dataset}


def choices(subject: Subject) -> dict[str, list[str]]:
    """The values of each dimension of which the study has several, in the order of the arms."""
    rows = [dimensions(arm) for arm in subject.arms]
    by_dimension = {name: list(dict.fromkeys(row[name] for row in rows if row[name])) for name in DIMENSIONS}
    return {name: [str(value) for value in values] for name, values in by_dimension.items() if len(values) > 1}


def _config(subject: Subject, arm: Arm) -> list[dict[str, Any]]:
    """The composed configs of an arm's runs, flattened, as far as their manifests record them."""
    artifacts = [subject.library.get(run.address) for run in arm.runs]
    return [flatten(artifact.record["config"]) for artifact in artifacts if artifact and "config" in artifact.record]


def model_name(subject: Subject) -> str:
    """The unpruned model's path or hub id where a run recorded it, and the start of its digest."""
    digest = text_of(subject.arms[0].run.settings["model"])
    paths = [config.get("model.path") for arm in subject.comparison.arms for config in _config(subject, arm)]
    path = next((str(path) for path in paths if path), None)
    return f"{path.removeprefix('.../')} ({digest})" if path else digest


def in_words(subject: Subject) -> Section:
    """The findings in sentences, and what to try next."""
    body = render(
        "findings.html", sentences=findings(subject.study), steps=next_steps(subject.study), first=MOST_SENTENCES
    )
    return Section("findings", "In words", "What the tables and figures below come to.", body=body)


def compared(subject: Subject) -> Section:
    """Counts, what differs between arms, and the composed config that all of them share."""
    arms = subject.arms
    runs = [run for arm in arms for run in arm.runs]
    settings: dict[str, list[str]] = {}
    for name in (*COLUMNS[1:], *dict.fromkeys(name for arm in arms for name in arm.differs)):
        values = [getattr(arm.run, name) if name in COLUMNS else arm.differs.get(name) for arm in arms]
        distinct = list(dict.fromkeys(text_of(value) for value in values if value is not None))
        if all(DIGEST.fullmatch(str(value)) for value in values if value is not None):
            continue  # what a digest stands for is named by another setting, or by the artifact
        if len(distinct) > 1 or (distinct and name not in COLUMNS):
            more = [f"and {len(distinct) - MOST_VALUES} more"] if len(distinct) > MOST_VALUES else []
            settings[name] = distinct[:MOST_VALUES] + more
    seeds = sorted({run.seed for run in runs if run.seed is not None})
    if len(seeds) > 1:
        settings["seed"] = [str(seed) for seed in seeds]
    configs = [config for arm in arms for config in _config(subject, arm)]
    shared = dict(configs[0]) if configs else {}
    for config in configs:
        shared = {name: value for name, value in shared.items() if name in config and config[name] == value}
    facts = {
        "unpruned model": model_name(subject),
        "arms": str(len(arms)),
        "evaluated runs": str(len(runs)),
        "seeds": f"{len(seeds)} ({spans(seeds)})" if seeds else "none",
        "evaluation": "; ".join(evaluation_of(comparison) for comparison in subject.study.comparisons),
        "tasks": ", ".join(subject.comparison.tasks),
    }
    body = render(
        "compared.html",
        facts=facts,
        settings=settings,
        shared={name: json.dumps(value, ensure_ascii=False) for name, value in shared.items()},
        recorded=len(configs),
        runs=len(runs),
        notes=subject.study.notes,
    )
    return Section(
        "compared", "What was compared", "Arms differ in the settings below and share all others.", body=body
    )


def _arm_cells(row: dict[str, Any], record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    retention = row["retention"] or {}
    symptoms = len(record["symptoms"]) if record["hidden"] else None
    return {
        "average": cell(row["average"]),
        "retention": cell(retention.get("ratio_of_means")),
        "mean of ratios": cell(retention.get("mean_of_ratios")),
        "trained on": cell(row["trained_on"]),
        "not trained on": cell(row["not_trained_on"]),
        "nll": cell(row["nll"], 3, 1),
        "parameters": plain("–" if row["parameters"] is None else f"{row['parameters']:,}", row["parameters"]),
        "FLOPs saved": plain(
            "–" if row["flops_saved"] is None else f"{100 * row['flops_saved']:.1f}", row["flops_saved"]
        ),
        PRICE: plain(priced(row["price"]), row["price"] and sum(row["price"].values())),
        "hidden damage": plain(f"⚠ {hidden_damage(record)}" if symptoms else "–", symptoms),
    }


def arms_table(subject: Subject) -> Section:
    """The table with its intervals, of the summary measures and of every task."""
    tables = []
    for comparison in subject.study.comparisons:
        about = evaluation_of(comparison)
        for title, cells in (
            (f"Arms ({about})", lambda row: _arm_cells(row, subject.study.health[row["arm"]])),
            ("Tasks", lambda row: {task.replace("_", " "): cell(value) for task, value in row["tasks"].items()}),
        ):
            lines = [line_of(subject, arm, cells(subject.rows[arm.name])) for arm in comparison.arms]
            tables.append(table(title, lines))
    body = render("table.html", tables=tables)
    return Section("table", "Arms", f"{METHOD} Every number leads to the artifacts behind it.", body=body)


def differences(subject: Subject) -> Section | None:
    """Paired differences between arms with equal settings."""
    pairs = pairs_of(subject.study.contrasts)
    if not pairs:
        return None
    titles = {"trained_on": "trained on", "not_trained_on": "not trained on"}
    lines = []
    for (a, b), by in list(pairs.items())[:MOST_CONTRASTS]:
        measures = ("average", "trained_on", "not_trained_on", "retention")
        cells = {titles.get(name, name): cell(by.get(name), signed=True) for name in measures}
        cells["nll"] = cell(by.get("nll"), 3, 1, signed=True)
        seeds = spans(by["average"]["seeds"]) or "–"
        lines.append(
            {"a": a, "b": b, "anchors": (subject.anchors[a], subject.anchors[b]), "seeds": seeds, "cells": cells}
            | {"own": own_settings(by)}
        )
    more = f" {len(pairs) - len(lines)} more are in contrasts.json." if len(pairs) > len(lines) else ""
    lead = (
        "The first arm minus the second on the same seeds and items, in percentage points (nll: nats per token, lower "
        f"is better). ▲ and ▼: the 95% interval leaves out zero. Each pair differs in one thing, or "
        f"has each arm at its own tuned settings, and says so.{more}"
    )
    body = render("contrasts.html", title="Scores", lines=lines, columns=columns(lines))
    return Section("differences", "Paired differences", lead, body=body)


def provenance(subject: Subject) -> Section:
    """For every arm its artifacts; for every artifact the command that made it."""
    arms = []
    every: dict[str, Artifact] = {}
    for arm in subject.arms:
        runs = []
        for run in arm.runs:
            evaluated = subject.library.get(run.address)
            upstream = subject.library.upstream(evaluated) if evaluated else []
            every |= {artifact.address: artifact for artifact in upstream}
            chain = sorted(upstream, key=lambda artifact: -ORDER.index(artifact.stage))
            command = evaluated.record.get("command", "") if evaluated else ""
            runs.append({"seed": run.seed, "chain": chain, "command": command})
        analyses: list[Artifact] = []
        for record in subject.analyses["arms"]:
            if record["arm"] == arm.name:
                analyses += [artifact for address in record["addresses"] if (artifact := subject.library.get(address))]
        for analysis in analyses:
            every |= {artifact.address: artifact for artifact in subject.library.upstream(analysis)}
        differs = {name: text_of(value) for name, value in arm.differs.items()}
        own: dict[str, Any] = {"name": arm.name, "anchor": subject.anchors[arm.name], "runs": runs, "differs": differs}
        arms.append({**own, "analyses": analyses, "look": arm.look})
    artifacts = sorted(every.values(), key=lambda artifact: (ORDER.index(artifact.stage), artifact.address))
    lead = (
        "Artifacts are folders <artifacts>/<stage>/<address>/; an address is a hash of the recipe, so the same command "
        "on the same code finds them again. The command is that of the job that first built an artifact."
    )
    body = render("provenance.html", arms=arms, artifacts=artifacts)
    return Section("provenance", "How each number was made", lead, body=body)
