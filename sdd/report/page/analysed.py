"""The analyses of students as sections take them: records of one kind, grouped by what was asked of the models."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdd.report.arms import DIGEST, Arm, text_of
from sdd.report.collect import flatten
from sdd.report.page.marks import record_of
from sdd.report.page.section import Subject
from sdd.report.selection import labels

TIMING = ("repeats", "timed_lengths", "timed_prompts")
"""Settings of how an analysis was timed, which change nothing that it counts."""


@dataclass(frozen=True)
class Group:
    """Records that may be compared: the same prompts and settings. `about` is what tells it from others of its kind."""

    name: str
    about: str
    records: list[tuple[Arm, dict[str, Any]]]

    @property
    def series(self) -> list[str]:
        """What the arms are called in a legend."""
        return labels([arm for arm, _ in self.records])[0]

    @property
    def looks(self) -> list[str]:
        return [arm.look for arm, _ in self.records]

    def only(self, measure: str) -> "Group":
        """The group as far as it has a measure."""
        return Group(
            self.name, self.about, [(arm, record) for arm, record in self.records if measure in record["measures"]]
        )


def value_of(record: dict[str, Any], measure: str, factor: float = 1) -> dict[str, float]:
    """A measure's mean and interval as the columns of a chart's row."""
    return {name: factor * record["measures"][measure][name] for name in ("mean", "low", "high")}


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flatten(record["settings"]).items() if name not in TIMING}


def setting_of(record: dict[str, Any]) -> str:
    """The same for what may be compared."""
    return json.dumps([record["prompts_of"], record["answers"], _settings(record)], sort_keys=True)


def groups(subject: Subject, kind: str) -> list[Group]:
    """The largest group first. Records of one arm that differ in how they were timed are one with all timings."""
    arms = {arm.name: arm for arm in subject.arms}
    by_setting: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in subject.analyses["arms"]:
        if record["kind"] == kind and record["arm"] in arms:
            by_setting.setdefault(setting_of(record), {}).setdefault(record["arm"], []).append(record)
    ordered = sorted(by_setting.values(), key=len, reverse=True)
    texts = [""] * len(ordered)
    for facts in zip(*(_facts(subject, next(iter(by_arm.values()))[0]) for by_arm in ordered), strict=True):
        texts = _with_differences(texts, facts)
    return [
        Group(f"{kind}-{number}", text, [(arms[name], _joined(records)) for name, records in by_arm.items()])
        for number, (text, by_arm) in enumerate(zip(texts, ordered, strict=True), 1)
    ]


def _joined(records: list[dict[str, Any]]) -> dict[str, Any]:
    most = max(records, key=lambda record: len(record["seeds"]))
    return most | {name: [item for record in records for item in record[name]] for name in ("addresses", "timings")}


def _facts(subject: Subject, record: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """What may tell a group apart, in turn: prompts and settings; how the answers were made; digests of either."""
    answered = subject.library.get(record["answers"] or "")
    settings = {"prompts": record["prompts_of"]} | _settings(record)
    made = flatten(answered.spec) if answered else {}
    every = made | settings | {"answers": record["answers"]}
    digests = {name for name, value in every.items() if DIGEST.fullmatch(str(value))}
    return *({n: v for n, v in facts.items() if n not in digests} for facts in (settings, made)), every


def _with_differences(texts: list[str], facts: Sequence[dict[str, Any]]) -> list[str]:
    """Add to each text the facts in which those of the same text differ."""
    extended = []
    for text, own in zip(texts, facts, strict=True):
        alike = [other for other_text, other in zip(texts, facts, strict=True) if other_text == text]
        differing = [name for name in own if len({json.dumps(other.get(name)) for other in alike}) > 1]
        words = [("prompts of " if n == "prompts" else f"{n.split('.')[-1]}=") + text_of(own[n]) for n in differing]
        extended.append(", ".join([text, *words] if text else words))
    return extended


def titled(title: str, group: Group) -> str:
    return f"{title} ({group.about})" if group.about else title


def prompts_of(groups: list[Group]) -> str:
    """' of NAME and NAME': the datasets whose prompts were asked."""
    names = dict.fromkeys(record["prompts_of"] for group in groups for _, record in group.records)
    datasets = [name for name in names if name]
    return f" of {' and '.join(datasets)}" if datasets else ""


def mean_of(records: list[dict[str, Any]], *path: str) -> float | None:
    """The mean over seeds of a number that lies deep; None where one lacks it."""
    values: list[Any] = records
    for name in path:
        values = [value.get(name) if value else None for value in values]
    return None if any(value is None for value in values) else sum(values) / len(values)


def row_of(subject: Subject, arm: Arm, record: dict[str, Any], series: str, **values: Any) -> dict[str, Any]:
    """A row of a chart that leads to the artifacts of the analysis."""
    seeds = ", ".join(map(str, record["seeds"])) or "none"
    return record_of(subject, arm, series=series, seeds=seeds, evaluated=" ".join(record["addresses"]), **values)


def timings_of(record: dict[str, Any], name: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """Timings that have what is named, by the machine that took them."""
    by_machine: dict[str, list[dict[str, Any]]] = {}
    for timing in record["timings"]:
        if timing and name in timing:
            by_machine.setdefault(machine(timing["machine"]), []).append(timing)
    return list(by_machine.items())


def machine(facts: dict[str, Any]) -> str:
    """'NAME, 2 threads, float32, torch 2.13'."""
    threads = facts.get("threads")
    words = [facts["device"], f"{threads} thread{'' if threads == 1 else 's'}" if threads else "", facts.get("dtype")]
    words.append(f"torch {facts['torch']}" if facts.get("torch") else "")
    return ", ".join(word for word in words if word)


def joined(spreads: list[dict[str, Any]]) -> dict[str, float]:
    """Over seeds: the mean of their medians, and the least and the greatest of all repeats."""
    mean = sum(spread["median"] for spread in spreads) / len(spreads)
    return {
        "mean": mean,
        "low": min(spread["low"] for spread in spreads),
        "high": max(spread["high"] for spread in spreads),
    }
