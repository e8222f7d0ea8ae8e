"""From runs to arms: runs that differ only in the seed are one arm, with a short name that no other arm has.

A name says what was done (`sft`, `self_distill`, `pruned`, ...) and then only what differs within the study: pruning,
metric, dataset, learning rate, rank, and any other setting that is needed to tell two arms apart. What belongs to
another evaluation or another unpruned model than most of the study is named last, so that the study's own
unpruned model is plainly `teacher`.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from sdd.finetuning.modes import MODES as TUNING
from sdd.finetuning.modes import REQUESTS
from sdd.report.collect import Run

MODES = ("teacher", "pruned", *TUNING, "merged")
ALWAYS = ("pruning.repair", "pruning.after", "finetune.learning_rate", "adapter.rank")
"""Settings named whenever they differ; others only where two arms would share a name."""
COLUMNS = ("kind", "finetune", "metric", "pruning", "dataset", "merge")
DIGEST = re.compile(r"[0-9a-f]{12,}")
LONG = 60
"""Characters of a setting that a name has room for."""
SELECTION = re.compile(r"targets\.(dataset.*|num_rows)")
"""Settings of the targets that mean the same whoever wrote the answers."""


@dataclass
class Arm:
    """Runs of one recipe over seeds, in the order of the seeds (none for deterministic arms)."""

    runs: list[Run]
    differs: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return " ".join(self.words)

    @property
    def run(self) -> Run:
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs if run.seed is not None]

    @property
    def mode(self) -> str:
        return self.run.finetune if self.run.kind == "tuned" else self.run.kind

    @property
    def look(self) -> str:
        """What decides how the arm is drawn: the method for merged students, else the mode."""
        return self.run.merge if self.mode == "merged" else self.mode

    @property
    def tuned(self) -> bool:
        return self.run.kind in ("tuned", "merged")


def text_of(value: Any) -> str:
    """A setting as short text: digests cut to 8 digits, templates to their beginning and end, lists joined."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "+".join(text_of(item) for item in value)
    text = " ".join(str(value).split())
    if DIGEST.fullmatch(text):
        return text[:8]
    return text if len(text) <= LONG else f"{text[: LONG // 2]}...{text[-LONG // 2 :]}"


def _same(value: Any) -> str:
    """Something hashable that is equal for equal settings (0.001 and 1e-3, 1 and 1.0)."""
    return json.dumps(float(value) if isinstance(value, int) and not isinstance(value, bool) else value, default=str)


def _scope(setting: str, arm: Arm) -> tuple[Any, ...] | None:
    """Arms among which a setting is worth comparing share this value; None where it says nothing about the arm."""
    run, first = arm.run, setting.split(".")[0]
    if first in ("model", "evaluation", "evaluated"):
        return ()
    if first in ("pruning", "scores", "pruned"):
        return ("pruning", run.pruning, run.metric) if run.base else None
    if first in ("targets", "rewrites"):
        return ("targets", run.finetune, run.dataset) if arm.tuned else None
    if first == "distillation":
        return ("distillation", run.finetune, run.dataset) if arm.tuned else None
    if first in ("merge", "merged"):
        return ("merge", run.merge) if run.kind == "merged" else None
    return ("tuned",) if arm.tuned else None


def _differing(arms: list[Arm]) -> list[str]:
    """Settings with more than one value among arms of one scope; a missing setting counts as a value."""
    differing = []
    for setting in dict.fromkeys(name for arm in arms for name in arm.run.settings):
        seen: dict[Any, set[str]] = {}
        for arm in arms:
            scope = _scope(setting, arm)
            if scope is not None:
                seen.setdefault(scope, set()).add(_same(arm.run.settings.get(setting)))
        if any(len(values) > 1 for values in seen.values()):
            differing.append(setting)
    return differing


def _order(arm: Arm, comparisons: list[str]) -> tuple[Any, ...]:
    run = arm.run
    size = (run.blocks_removed is None, run.blocks_removed or run.width)
    mode = MODES.index(arm.mode) if arm.mode in MODES else len(MODES)
    settings = [
        (0, float(value), "") if isinstance(value, int | float) else (1, 0.0, str(value))
        for value in arm.differs.values()
    ]
    teacher_first = arm.mode != "teacher"
    columns = (run.pruning, mode, run.metric or "", run.dataset or "")
    return comparisons.index(run.comparison), teacher_first, *size, *columns, settings, run.key


def _part(setting: str, value: Any) -> str:
    known = [name for name, request in REQUESTS.items() if request and request.template == value]
    if known and setting.endswith("template"):
        return f"request={known[0]}"
    short = "tasks" if setting.startswith("evaluation.tasks") else setting.split(".")[-1]
    short = "lr" if short == "learning_rate" else short
    return f"{short}={text_of(value)}"


def _name(arms: list[Arm], differing: list[str], main: Run) -> None:
    """Give each arm the words of its name."""
    pruned, tuned = [arm for arm in arms if arm.run.base], [arm for arm in arms if arm.tuned]
    many_prunings = len({arm.run.pruning for arm in pruned}) > 1
    many_metrics = len({arm.run.metric for arm in pruned if arm.run.metric}) > 1
    many_datasets = len({arm.run.dataset for arm in tuned}) > 1
    merged = [arm.run for arm in arms if arm.mode == "merged"]
    merged_modes, many_merges = len({run.finetune for run in merged}) > 1, len({run.merge for run in merged}) > 1
    for arm in arms:
        run = arm.run
        words = ["control"] if arm.tuned and not run.base else []
        words.append(arm.mode)
        if arm.mode == "merged" and merged_modes:
            words.append(run.finetune)
        if arm.mode == "merged" and many_merges:
            words.append(run.merge)
        words.append(run.pruning if run.base and many_prunings else "")
        if run.base and many_metrics and run.metric:
            words.append(run.metric)
        if arm.tuned and many_datasets and run.dataset:
            words.append(run.dataset)
        words += [_part(name, arm.differs[name]) for name in ALWAYS if name in arm.differs]
        if run.comparison != main.comparison:
            unlike = [n for n in differing if _scope(n, arm) == () and run.settings.get(n) != main.settings.get(n)]
            unlike.sort(key=lambda name: name.startswith("evaluation.tasks"))
            words += [_part(name, run.settings.get(name)) for name in unlike[:1]]
        arm.words = [word for word in words if word]

    def clashes() -> list[list[Arm]]:
        groups: dict[str, list[Arm]] = {}
        for arm in arms:
            groups.setdefault(arm.name, []).append(arm)
        return [group for group in groups.values() if len(group) > 1]

    def said_last(setting: str) -> tuple[bool, bool]:
        """What says little to a reader: digests of data that another setting describes."""
        values = (str(arm.run.settings.get(setting)) for arm in arms)
        return setting.startswith("evaluation.tasks"), any(map(DIGEST.fullmatch, values))

    for setting in sorted(differing, key=said_last):
        for group in clashes():
            if len({_same(arm.run.settings.get(setting)) for arm in group}) > 1:
                for arm in group:
                    if setting in arm.run.settings:
                        arm.words.append(_part(setting, arm.run.settings[setting]))
    for group in clashes():
        for number, arm in enumerate(group[1:], start=2):
            arm.words.append(f"#{number}")


def build_arms(runs: list[Run]) -> list[Arm]:
    """Arms in the order of the table: the largest comparison first; teacher, then by pruning, then by mode."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.key, []).append(run)
    arms = [Arm(sorted(group, key=lambda run: run.seed or 0)) for group in grouped.values()]
    differing = _differing(arms)
    for arm in arms:
        settings = arm.run.settings
        arm.differs = {n: settings[n] for n in differing if n in settings and _scope(n, arm) is not None}
    sizes = Counter(arm.run.comparison for arm in arms)
    comparisons = sorted(sizes, key=lambda comparison: (-sizes[comparison], comparison))
    arms.sort(key=lambda arm: _order(arm, comparisons))
    _name(arms, differing, arms[0].run)
    return arms


def settings_differ(a: Arm, b: Arm) -> dict[str, list[Any]]:
    """Settings of fine-tuning in which two arms differ, name -> [of a, of b].

    Who wrote the answers and how they are taught is what an arm is, and not among them.
    """
    names = dict.fromkeys([*a.run.settings, *b.run.settings])
    differences = {}
    for name in names:
        scopes = _scope(name, a), _scope(name, b)
        if None in scopes or scopes[0] == () or name.startswith(("merge", "pruned.", "evaluated.")):
            continue
        across = SELECTION.fullmatch(name) or not name.startswith(("targets.", "rewrites.", "distillation."))
        everywhere = name in a.run.settings and name in b.run.settings
        if scopes[0] != scopes[1] and not (across and everywhere):
            continue
        left, right = a.run.settings.get(name), b.run.settings.get(name)
        if _same(left) != _same(right):
            differences[name] = [left, right]
    return differences
