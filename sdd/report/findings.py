"""What a study found, in sentences for a reader who knows none of its words: derived from the table and the contrasts.

Of the largest comparison alone. A difference whose interval holds zero is said to be possibly chance, big or not.
"""

from typing import Any

from sdd.finetuning.modes import MODES
from sdd.report.arms import Arm, text_of
from sdd.report.contrasts import Study
from sdd.report.health_table import damage
from sdd.report.tables import evaluation_of, own_settings, pairs_of, percent

WAYS = {
    "sft": "fine-tuned on the reference answers",
    "self_distill": "fine-tuned on the unpruned model's own rewrites of them",
    "logit_distill": "fine-tuned on the unpruned model's token probabilities",
    "on_policy": "fine-tuned on what the unpruned model makes of the student's own answers",
    "gold": "fine-tuned on right answers in the unpruned model's own style, which only a made-up task has",
    "merged": "merged from two students",
}
MOST = 8
"""Sentences about fine-tuned arms, and as many about differences; the tables have all."""


def findings(study: Study) -> list[str]:
    """Sentences: models before fine-tuning, each way of getting quality back, differences, and on what this rests."""
    comparison = study.comparisons[0]
    rows = {row["arm"]: row for row in study.rows}
    tuned = [arm for arm in comparison.arms if arm.tuned]
    sentences = _answer(study, {arm.name: arm for arm in tuned}, rows)
    if (teacher := comparison.teacher) is not None:
        sentences.append(f"The unpruned model scores {percent(rows[teacher.name]['average'])} percent.")
    sentences += [_kept(arm, rows[arm.name]) for arm in comparison.arms if arm.mode == "pruned"][:MOST]
    sentences += [_kept(arm, rows[arm.name]) for arm in tuned[:MOST]]
    if len(tuned) > MOST:
        means = [100 * rows[arm.name]["average"]["mean"] for arm in tuned]
        sentences.append(
            f"All {len(tuned)} fine-tuned arms score between {min(means):.1f} and {max(means):.1f} percent."
        )
    sentences += _damaged(study, [arm.name for arm in comparison.arms])[:MOST]
    differences = _differences(study, {arm.name: arm for arm in tuned})
    sentences += differences[:MOST]
    if len(differences) > MOST:
        sentences.append(f"{len(differences) - MOST} more differences between ways of fine-tuning are in the tables.")
    seeds = [len(arm.seeds) for arm in tuned]
    fewest, most = min(seeds, default=0), max(seeds, default=0)
    runs = f", {fewest if fewest == most else f'{fewest} to {most}'} seeds an arm" if seeds else ""
    rests = evaluation_of(comparison) + runs
    sentences.append(f"This rests on one unpruned model and {rests}; brackets are 95% intervals over seeds and items.")
    return sentences


def _answer(study: Study, arms: dict[str, Arm], rows: dict[str, dict[str, Any]]) -> list[str]:
    """The study's question in one sentence: rewrites against references, each at its own rates where that was run."""
    pairs = [
        (a, b, by)
        for (a, b), by in pairs_of(study.contrasts).items()
        if a in arms and b in arms and (arms[a].mode, arms[b].mode) == ("self_distill", "sft") and arms[a].run.base
    ]
    if not pairs:
        return []

    def weight(pair: tuple[str, str, dict[str, dict[str, Any]]]) -> tuple[int, bool, float]:
        return len(pair[2]["average"]["seeds"]), bool(own_settings(pair[2])), rows[pair[0]]["average"]["mean"]

    a, b, by = max(pairs, key=weight)
    is_kept = "retention" in by
    scores = [rows[arm]["retention"]["ratio_of_means"] if is_kept else rows[arm]["average"] for arm in (a, b)]
    ours, theirs = (percent(score).replace(" ", "% ", 1) for score in scores)
    difference = by["retention" if is_kept else "average"]
    verb, of = ("keeps", " of what the unpruned model scores") if is_kept else ("scores", "")
    return [
        f"{_cut(arms[a]).capitalize()}, the model {verb} {ours}{of} when it is fine-tuned on the unpruned model's own "
        f"rewrites, and {theirs} on the reference answers{_at(by)}; the difference, "
        f"{percent(difference, signed=True)} points, {_verdict(difference, 'is ')}."
    ]


def _damaged(study: Study, arms: list[str]) -> list[str]:
    """Arms whose average is fine and whose answers are not."""
    return [
        f"{arm} hides damage behind its average: {damage(study.health[arm])}."
        for arm in arms
        if study.health[arm]["hidden"]
    ]


def _differences(study: Study, arms: dict[str, Arm]) -> list[str]:
    """Between ways of fine-tuning; what a setting does within one is a matter of the tables."""
    return [
        _difference(arms[a], arms[b], by)
        for (a, b), by in pairs_of(study.contrasts).items()
        if a in arms and b in arms and arms[a].look != arms[b].look
    ]


def _cut(arm: Arm) -> str:
    run = arm.run
    if run.blocks_removed:
        return f"with {run.blocks_removed} block{'s' if run.blocks_removed > 1 else ''} removed"
    return "unpruned" if not run.base else f"pruned ({text_of(run.pruning)})"


def _way(mode: str) -> str:
    return WAYS.get(mode) or (f"fine-tuned on {MODES[mode].words}" if mode in MODES else mode)


def _kept(arm: Arm, row: dict[str, Any]) -> str:
    how = f", {_way(arm.mode)}," if arm.tuned else ""
    retention = (row["retention"] or {}).get("ratio_of_means")
    kept = f", {percent(retention)} percent of the unpruned model's" if retention else ""
    return f"{_cut(arm).capitalize()}{how} it scores {percent(row['average'])} percent{kept} ({arm.name})."


def _difference(a: Arm, b: Arm, by: dict[str, dict[str, Any]]) -> str:
    value = by["average"]
    return f"{a.name} minus {b.name}{_at(by)}: {percent(value, signed=True)} points, {_verdict(value, '', 'which ')}."


def _at(by: dict[str, dict[str, Any]]) -> str:
    own = own_settings(by)
    return f", each at its own {own}" if own else ""


def _verdict(value: dict[str, Any], verb: str, relative: str = "") -> str:
    chance = value["low"] <= 0 <= value["high"]
    return f"{relative}could be chance" if chance else f"{verb}more than chance explains"
