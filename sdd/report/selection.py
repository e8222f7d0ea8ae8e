"""Which arms a plot shows, what it calls them, and the line that says what it rests on.

A plot has room for few arms. They are taken from the modes in turn, in the order of the table, so that a crowded study
still shows every mode, at the same settings. Words that all shown arms share move from the legend to the line under
the title.
"""

from collections.abc import Iterable

from sdd.report.arms import Arm
from sdd.report.measures import Comparison

MOST = 8
MOST_PER_MODE = 4
"""As many as there are tints and line styles for one mode."""
WHISKERS = "whiskers: 95% interval"


def pick(arms: list[Arm]) -> list[Arm]:
    """At most `MOST` arms and `MOST_PER_MODE` of a mode, the modes in turn; in the given order."""
    by_mode: dict[str, list[Arm]] = {}
    for arm in arms:
        by_mode.setdefault(arm.mode, []).append(arm)
    turns = [(turn, place, arm) for place, mode in enumerate(by_mode.values()) for turn, arm in enumerate(mode)]
    turns = [entry for entry in turns if entry[0] < MOST_PER_MODE]
    chosen = [id(arm) for _, _, arm in sorted(turns, key=lambda entry: entry[:2])[:MOST]]
    return [arm for arm in arms if id(arm) in chosen]


def labels(arms: list[Arm], without_pruning: bool = False) -> tuple[list[str], str]:
    """A name for each arm without the words that all of them share, and those words."""
    words = [[w for w in arm.words if not (without_pruning and w == arm.run.pruning)] for arm in arms]
    named = [arm_words for arm, arm_words in zip(arms, words, strict=True) if arm.mode != "teacher"]
    shared = [w for w in (named[0] if named else []) if len(named) > 1 and all(w in arm_words for arm_words in named)]
    shared = [w for w in shared if w not in {"control", *(arm.mode for arm in arms)}]
    return [" ".join(w for w in arm_words if w not in shared) for arm_words in words], ", ".join(shared)


def by_series(arms: Iterable[Arm]) -> dict[str, list[Arm]]:
    """Arms that differ in the size alone are one series."""
    series: dict[str, list[Arm]] = {}
    for arm in arms:
        series.setdefault(labels([arm], without_pruning=True)[0][0], []).append(arm)
    return series


def _span(numbers: set[int]) -> str:
    return " to ".join(str(number) for number in sorted({min(numbers), max(numbers)}))


def basis(comparison: Comparison, arms: list[Arm], shared: str = "", left_out: int = 0) -> str:
    """What a plot rests on: settings of all arms, items, tasks, seeds, and how many arms it does not show."""
    items, tasks = _span(set(comparison.items.values())), len(comparison.tasks)
    parts = [f"all {shared}"] if shared else []
    parts.append(f"n = {items} items in each of {tasks} tasks" if tasks > 1 else f"n = {items} items")
    parts += seeds_of(arms)
    if left_out:
        parts.append(f"{left_out} more in table.md")
    return "; ".join([*parts, WHISKERS])


def seeds_of(arms: list[Arm]) -> list[str]:
    """'3 seeds per fine-tuned arm', or nothing where all arms are deterministic."""
    numbers = {len(arm.seeds) for arm in arms if arm.seeds}
    return [f"{_span(numbers)} seed{'' if numbers == {1} else 's'} per fine-tuned arm"] if numbers else []
