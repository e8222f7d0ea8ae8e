"""The analyses of students as sections take them: records of one kind, grouped by what was asked of the models."""

import json
from dataclasses import dataclass
from typing import Any

from sdd.report.arms import Arm, text_of
from sdd.report.collect import flatten
from sdd.report.page.marks import record_of
from sdd.report.page.section import Subject
from sdd.report.selection import labels

ASKED = ("prompts_of", "answers", "settings")


@dataclass(frozen=True)
class Group:
    """Records that may be compared: the same prompts and settings."""

    name: str
    about: str
    records: list[tuple[Arm, dict[str, Any]]]

    @property
    def series(self) -> list[str]:
        """What the arms are called in a legend."""
        return labels([arm for arm, _ in self.records])[0]

    @property
    def modes(self) -> list[str]:
        return [arm.mode for arm, _ in self.records]

    def only(self, measure: str) -> "Group":
        """The group as far as it has a measure."""
        return Group(self.name, self.about, [each for each in self.records if measure in each[1]["measures"]])


def asked_of(record: dict[str, Any]) -> str:
    return json.dumps([record[name] for name in ASKED], sort_keys=True)


def groups(subject: Subject, kind: str) -> list[Group]:
    """The largest group first."""
    arms = {arm.name: arm for arm in subject.arms}
    found: dict[str, list[tuple[Arm, dict[str, Any]]]] = {}
    for record in subject.analyses["arms"]:
        if record["kind"] == kind and record["arm"] in arms:
            found.setdefault(asked_of(record), []).append((arms[record["arm"]], record))
    every = sorted(found.values(), key=len, reverse=True)
    return [
        Group(f"{kind}-{number}", about, records)
        for number, (about, records) in enumerate(zip(_about([each[0][1] for each in every]), every, strict=True), 1)
    ]


def _about(firsts: list[dict[str, Any]]) -> list[str]:
    """What tells groups apart: the dataset of the prompts, settings that differ, else the address of the answers."""
    settings = [{**flatten(first["settings"]), "prompts": first["prompts_of"]} for first in firsts]
    names = dict.fromkeys(name for each in settings for name in each)
    differing = [name for name in names if len({json.dumps(each.get(name)) for each in settings}) > 1]
    found = []
    for first, each in zip(firsts, settings, strict=True):
        parts = [f"prompts of {first['prompts_of']}"] if first["prompts_of"] else []
        parts += [f"{name}={text_of(each[name])}" for name in differing if name != "prompts" and name in each]
        found.append(", ".join(parts))
    return [
        f"{about}, answers {first['answers'][:8]}" if found.count(about) > 1 and first["answers"] else about
        for about, first in zip(found, firsts, strict=True)
    ]


def titled(title: str, group: Group) -> str:
    return f"{title} ({group.about})" if group.about else title


def row_of(subject: Subject, arm: Arm, record: dict[str, Any], series: str, **values: Any) -> dict[str, Any]:
    """A row of a chart that leads to the artifacts of the analysis."""
    return record_of(subject, arm, series=series, evaluated=" ".join(record["addresses"]), **values)


def timings_of(record: dict[str, Any], name: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Timings that have what is named, by the machine that took them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for timing in record["timings"]:
        if timing and name in timing:
            found.setdefault(machine(timing["machine"]), []).append(timing)
    return list(found.items())


def machine(facts: dict[str, Any]) -> str:
    """'NAME, 2 threads, float32, torch 2.13'."""
    threads = facts.get("threads")
    words = [facts["device"], f"{threads} thread{'' if threads == 1 else 's'}" if threads else "", facts.get("dtype")]
    words.append(f"torch {facts['torch']}" if facts.get("torch") else "")
    return ", ".join(word for word in words if word)


def joined(spreads: list[dict[str, Any]]) -> dict[str, float]:
    """Over seeds: the mean of their medians, and the least and the greatest of all repeats."""
    mean = sum(each["median"] for each in spreads) / len(spreads)
    return {"mean": mean, "low": min(each["low"] for each in spreads), "high": max(each["high"] for each in spreads)}
