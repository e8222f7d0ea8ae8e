"""What models were asked and what they said: evaluated answers side by side, and training rows with their rewrites.

Which items are shown does not depend on the answers: the first ones by the SHA-256 of their id, as many as fit. Every
distinct text is stored once and named by its number.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from sdd.report.arms import Arm
from sdd.report.collect import SUMMARY
from sdd.report.page.section import Section, Subject, render
from sdd.store.files import AGAIN, shown_json, shown_rows
from sdd.untrusted import check_shape

TRAINED = {"id": (str, int), "prompt": str, "reference": str, "target": str, "source": str, "reason": str}
WRITTEN = {"id": (str, int), "rewrite": (str, None)}

MOST_PER_TASK = 24
MOST_PER_REASON = 10
MOST_CHARACTERS = 1_200
"""Of one text; a longer one keeps its two ends, since few-shot prompts are long and end with the question."""
BUDGET = 2_000_000
"""Characters of all answers together, so that the page of 200 runs stays small; at least one item a task is shown."""


class Texts:
    """Distinct texts by number, and how many characters they and the numbers that name them take."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.characters = 0

    def number(self, text: Any) -> int:
        short = shortened(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False))
        if short not in self.numbers:
            self.numbers[short] = len(self.numbers)
            self.characters += len(short) + 4
        self.characters += 12
        return self.numbers[short]


def shortened(text: str) -> str:
    half = MOST_CHARACTERS // 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half]}\n[...]\n{text[-half:]}"


def by_digest(ids: Any) -> list[str]:
    """Ids in an order that has nothing to do with what they name."""
    return sorted(ids, key=lambda id: hashlib.sha256(id.encode()).hexdigest())


def read_items(arm: Arm, task: str, chosen: set[str] | None = None) -> dict[str, dict[str, Any]]:
    """Samples of an arm's first seed by item id, all or those chosen."""
    rows = shown_rows(arm.run.path / "samples" / f"{task}.jsonl", arm.run.path)
    return {str(row["id"]): row for row in rows if chosen is None or str(row["id"]) in chosen}


def answers(subject: Subject) -> Section | None:
    """Prompt, expected answer, and what each arm said, side by side."""
    comparison = subject.comparison
    chosen: dict[str, list[str]] = {}
    samples: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for task in comparison.tasks:
        first = read_items(comparison.arms[0], task)
        chosen[task] = by_digest(first)[:MOST_PER_TASK]
        samples[task] = [read_items(arm, task, set(chosen[task])) for arm in comparison.arms]
    texts = Texts()
    items: list[dict[str, Any]] = []
    per_task = 0
    for turn in range(MOST_PER_TASK):
        if turn and texts.characters > BUDGET:
            break
        per_task = turn + 1
        for task in comparison.tasks:
            if turn < len(chosen[task]):
                items.append(_item(task, chosen[task][turn], samples[task], texts))
    if not items:
        return None
    items.sort(key=lambda item: comparison.tasks.index(item["task"]))
    per_task = min(per_task, max(map(len, chosen.values())))
    anchors = [subject.anchors[arm.name] for arm in comparison.arms]
    seeds = [arm.seeds[0] if arm.seeds else None for arm in comparison.arms]
    lead = (
        f"{per_task} items of each task, the first by the SHA-256 of their id, whatever was answered; of arms with "
        f"several seeds the first seed. Texts of more than {MOST_CHARACTERS:,} characters are cut in the middle."
    )
    return Section(
        "answers",
        "Answers side by side",
        lead,
        body=render("answers.html", tasks=comparison.tasks),
        data={
            "arms": [arm.name for arm in comparison.arms],
            "anchors": anchors,
            "seeds": seeds,
            "texts": list(texts.numbers),
            "items": items,
        },
    )


def _item(task: str, item: str, arms: list[dict[str, dict[str, Any]]], texts: Texts) -> dict[str, Any]:
    """One prompt; for each arm [number of its answer, score], or None where it was not asked."""
    sample = next(rows[item] for rows in arms if item in rows)
    responses = [
        [texts.number(row.get("response", "")), row["score"]] if (row := rows.get(item)) else None for rows in arms
    ]
    numbers: dict[str, Any] = {name: texts.number(sample[name]) for name in ("prompt", "answer") if name in sample}
    return {"task": task, "id": item, **numbers, "said": responses}


def rewrites(subject: Subject) -> Section | None:
    """Training rows: prompt, reference, rewrite, which of them became the target and why."""
    texts = Texts()
    sets: list[dict[str, Any]] = []
    for artifact in _targets(subject):
        source = subject.library.get(artifact.inputs.get("rewrites", ""))
        written = {} if source is None else _written(source.path)
        rows: dict[str, dict[str, dict[str, Any]]] = {}
        for row in shown_rows(artifact.path / "train.jsonl", artifact.path):
            check_shape(row, TRAINED, f"{artifact.path}/train.jsonl has a broken row; {AGAIN}: row")
            rows.setdefault(str(row["reason"]), {})[str(row["id"])] = row
        examples = [
            _row(by_id[id], written.get(id), texts)
            for by_id in rows.values()
            for id in by_digest(by_id)[:MOST_PER_REASON]
        ]
        reasons = shown_json(artifact.path / "summary.json", SUMMARY).get("reasons", {})
        name = f"{artifact.labels.get('dataset') or 'targets'} ({artifact.address})"
        sets.append({"name": name, "address": artifact.address, "reasons": reasons, "rows": examples})
    if not sets:
        return None
    lead = (
        "What the unpruned model made of the reference answers, and why each row's target is the rewrite or stays the "
        f"reference. Up to {MOST_PER_REASON} rows of each reason, the first by the SHA-256 of their id."
    )
    body = render("rewrites.html", sets=sets)
    return Section("rewrites", "Rewrites", lead, body=body, data={"texts": list(texts.numbers), "sets": sets})


def _written(folder: Path) -> dict[str, dict[str, Any]]:
    rows = {}
    for row in shown_rows(folder / "rewrites.jsonl", folder):
        check_shape(row, WRITTEN, f"{folder}/rewrites.jsonl has a broken row; {AGAIN}: row")
        rows[str(row["id"])] = row
    return rows


def _row(row: dict[str, Any], written: dict[str, Any] | None, texts: Texts) -> dict[str, Any]:
    """One training row by the numbers of its texts; a rejected rewrite is known only while its artifact is there."""
    kept = row["source"] == "rewrite"
    rewrite = written["rewrite"] if written else row["target"] if kept else "(its artifact is gone)"
    fields = {"prompt": row["prompt"], "reference": row["reference"], "rewrite": rewrite}
    numbers = {name: texts.number(text) for name, text in fields.items()}
    return {"id": str(row["id"]), **numbers, "kept": kept, "reason": str(row["reason"])}


def _targets(subject: Subject) -> list[Any]:
    """Targets that were selected from rewrites, each once."""
    targets = {}
    for arm in subject.arms:
        for run in arm.runs:
            evaluated = subject.library.get(run.address)
            for artifact in subject.library.upstream(evaluated) if evaluated else []:
                if artifact.stage == "targets" and artifact.inputs.get("rewrites") and "mode" in artifact.spec:
                    targets[artifact.address] = artifact
    return [artifact for artifact in targets.values() if (artifact.path / "train.jsonl").is_file()]
