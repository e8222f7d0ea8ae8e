"""Which arms are contrasted: a minus b.

Two arms that share a base model and a dataset, the later mode minus the earlier one (untuned, sft, logit_distill,
self_distill, gold, merged), and each with its base; an arm on a repaired model with the same on the model as it was
cut; a merge with each of its students. And where a baseline was named, such as `metric=magnitude` or `adapter.rank=16`,
every arm with the one that has that value and is otherwise the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdd.errors import UserError
from sdd.report.arms import MODES, Arm, settings_differ, text_of

FOLLOWS = {
    "finetune": ("targets.", "rewrites.", "distillation."),
    "metric": ("scores.", "pruning."),
    "pruning": ("scores.", "pruning."),
    "dataset": ("targets.",),
    "merge": ("targets.", "rewrites.", "distillation."),
}
"""What names an arm, and the settings that follow from it."""


@dataclass(frozen=True)
class Pair:
    """a minus b; `about` is the setting in which they differ on purpose, "" where that is who wrote the answers.

    `baseline` is the setting and value that b was asked for with, if it was.
    """

    a: Arm
    b: Arm
    about: str = ""
    baseline: str = ""

    @property
    def settings_differ(self) -> dict[str, list[Any]]:
        """Settings in which two tuned arms differ besides."""
        if not (self.a.tuned and self.b.tuned):
            return {}
        follows = FOLLOWS.get(self.about, (self.about,) if self.about else ())
        return {
            name: values
            for name, values in settings_differ(self.a, self.b).items()
            if name == "pruning.repair" or not name.startswith(follows)
        }


def pairs(arms: list[Arm], baselines: Sequence[str] = ()) -> list[Pair]:
    """All pairs among the arms of one comparison, each once."""
    untuned = {arm.run.base: arm for arm in arms if not arm.tuned}
    tuned = [arm for arm in arms if arm.tuned]
    tuned.sort(key=lambda arm: MODES.index(arm.mode) if arm.mode in MODES else len(MODES))
    contrasts = [Pair(arm, untuned[arm.run.base]) for arm in tuned if arm.run.base in untuned]
    contrasts += [
        Pair(later, earlier)
        for index, later in enumerate(tuned)
        for earlier in tuned[:index]
        if (later.run.base, later.run.dataset) == (earlier.run.base, earlier.run.dataset)
    ]
    contrasts += _repaired(arms) + _merged(tuned)
    for baseline in baselines:
        contrasts += _against(arms, baseline)
    return list({(pair.a.name, pair.b.name): pair for pair in contrasts}.values())


def _repaired(arms: list[Arm]) -> list[Pair]:
    """Each arm on a repaired model with the one that differs from it in the repair alone."""

    def differ_in_repair_alone(a: Arm, b: Arm) -> bool:
        names = settings_differ(a, b) if a.tuned else {}
        return (a.mode, a.run.dataset) == (b.mode, b.run.dataset) and all(n.startswith("pruning.") for n in names)

    repaired = [arm for arm in arms if arm.run.base != arm.run.cut]
    return [Pair(a, b) for a in repaired for b in arms if b.run.base == a.run.cut and differ_in_repair_alone(a, b)]


def _merged(tuned: list[Arm]) -> list[Pair]:
    """Each merge with each of the students that it was made of."""

    def made_of(merge: Arm, student: Arm) -> bool:
        return any(part.tuned < whole.tuned for part in student.runs for whole in merge.runs)

    merges = [arm for arm in tuned if arm.mode == "merged"]
    return [Pair(merge, arm, "merge") for merge in merges for arm in tuned if made_of(merge, arm)]


# ---- against a baseline -------------------------------------------------------------------------------------------


def _value(arm: Arm, name: str) -> str:
    """What an arm has as a column of the table, or as a setting by its dotted name."""
    if name == "finetune":
        return arm.mode
    return text_of(getattr(arm.run, name) if name in FOLLOWS else arm.run.settings.get(name))


def _parsed(baseline: str) -> tuple[str, str]:
    """Name and value, numbers as `_value` writes them."""
    name, _, value = baseline.partition("=")
    try:
        return name, text_of(float(value))
    except ValueError:
        return name, value


def check_baselines(arms: list[Arm], baselines: Sequence[str]) -> None:
    """Refuse a baseline that no arm has."""
    for baseline in baselines:
        name, value = _parsed(baseline)
        values = list(dict.fromkeys(_value(arm, name) for arm in arms))
        if value in values:
            continue
        if values == ["None"]:
            names = dict.fromkeys([*FOLLOWS, *(setting for arm in arms for setting in arm.differs)])
            raise UserError(f"--baseline {baseline}: no arm has {name}; what differs is {', '.join(names)}")
        choices = ", ".join(text for text in values if text != "None")
        raise UserError(f"--baseline {baseline}: no arm has this value; there are {choices}")


def _against(arms: list[Arm], baseline: str) -> list[Pair]:
    name, value = _parsed(baseline)

    def fixed(arm: Arm) -> list[Any]:
        """All that must be the same. A criterion is compared at equal size, be it of blocks or of channels."""
        settings: list[Any] = [
            _value(arm, column) for column in FOLLOWS if column != name and (name, column) != ("metric", "pruning")
        ]
        settings += [f"{arm.run.flops_saved or 0:.2f}"] if name == "metric" else []
        return settings + ([_value(arm, "pruning.repair")] if name != "pruning.repair" else [])

    contrasts = [
        Pair(arm, base, name, baseline)
        for base in arms
        if _value(base, name) == value
        for arm in arms
        if _value(arm, name) != value and fixed(arm) == fixed(base)
    ]
    return [pair for pair in contrasts if not pair.settings_differ]
