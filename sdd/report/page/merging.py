"""Merged students: how each was made, and how far apart its students stood."""

from typing import Any

from sdd.report.page.section import Section, Subject, render
from sdd.store.files import shown_json


def merging(subject: Subject) -> Section | None:
    """Method, settings, students and the note on angles of every merged arm, as `merging.json` has them."""
    lines = []
    for arm in subject.arms:
        for run in arm.runs:
            evaluated = subject.library.get(run.address)
            merged = subject.library.get(evaluated.inputs.get("model", "")) if evaluated else None
            if merged is None or merged.stage != "merged":
                continue
            file = merged.path / "merging.json"
            facts: dict[str, Any] = shown_json(file, {"note?": (str, None)}) if file.is_file() else {}
            settings = [f"{name}={value}" for name, value in merged.spec.items() if name != "method"]
            students = [student for address in merged.inputs.values() if (student := subject.library.get(address))]
            line: dict[str, Any] = {"arm": arm.name, "anchor": subject.anchors[arm.name], "look": arm.look}
            line |= {
                "seed": run.seed,
                "method": run.merge,
                "settings": settings,
                "students": students,
                "note": facts.get("note") or "",
            }
            lines.append(line)
    if not lines:
        return None
    lead = "Two or more students of one pruned model become one checkpoint. Light adapters leave them nearly parallel."
    return Section("merging", "Merged students", lead, body=render("merging.html", lines=lines))
