"""What to try next, derived from what a study lacks: models to compare with, seeds, items, rates, sizes, answers read.

Each step is a sentence with the settings that do it. Only the largest comparison is looked at, as in `findings`.
"""

from typing import Any

from sdd.report.arms import Arm, text_of
from sdd.report.contrasts import Study
from sdd.report.measures import Comparison
from sdd.report.tables import pairs_of, percent

ENOUGH_SEEDS = 5
MOST = 6


def next_steps(study: Study) -> list[str]:
    """At most `MOST`, what the numbers need most first."""
    comparison = study.comparisons[0]
    tuned = [arm for arm in comparison.arms if arm.tuned and arm.run.base]
    steps = [
        *_missing_models(comparison, tuned),
        *_hidden_damage(study, comparison),
        *_open_differences(study, {arm.name: arm for arm in tuned}),
        *_rates(tuned),
        *_ways(comparison, tuned),
        *_sizes(comparison),
    ]
    return steps[:MOST]


def _missing_models(comparison: Comparison, tuned: list[Arm]) -> list[str]:
    steps = []
    if comparison.teacher is None:
        steps.append("Evaluate the unpruned model (pruning=none finetune=none): without it nobody knows what was kept.")
    untuned = {arm.run.base for arm in comparison.arms if not arm.tuned}
    if any(arm.run.base not in untuned for arm in tuned):
        steps.append("Evaluate the pruned model as it was cut (finetune=none): it says what fine-tuning gave back.")
    return steps


def _hidden_damage(study: Study, comparison: Comparison) -> list[str]:
    names = [arm.name for arm in comparison.arms if study.health[arm.name]["hidden"]]
    if not names:
        return []
    return [
        f"Read the answers of {', '.join(names)} side by side on the page: the average hides what is worse in them."
    ]


def _open_differences(study: Study, arms: dict[str, Arm]) -> list[str]:
    """Of ways of fine-tuning whose difference could be chance, and of those that rest on one seed."""
    few_seeds: list[tuple[str, str, dict[str, Any]]] = []
    many_seeds: list[tuple[str, str, dict[str, Any]]] = []
    for (a, b), by in pairs_of(study.contrasts).items():
        if a not in arms or b not in arms or arms[a].look == arms[b].look:
            continue
        value = by["average"]
        if value["low"] <= 0 <= value["high"]:
            (few_seeds if len(value["seeds"]) < ENOUGH_SEEDS else many_seeds).append((a, b, value))
    steps = []
    if few_seeds:
        a, b, value = max(few_seeds, key=_width)
        more = max(value["seeds"], default=-1) + 1
        seeds = ",".join(map(str, range(more, more + ENOUGH_SEEDS - len(value["seeds"]))))
        steps.append(
            f"Run more seeds (seed={seeds}): {a} minus {b} is {percent(value, signed=True)} points over "
            f"{_plural(len(value['seeds']))}, which could be chance."
        )
    elif any(len(arm.seeds) == 1 for arm in arms.values()):
        steps.append("Run more seeds: with one, an interval says nothing of what another seed would give.")
    if many_seeds:
        a, b, value = max(many_seeds, key=_width)
        steps.append(
            f"Ask more items (evaluation.limit): {a} minus {b} is {percent(value, signed=True)} points over "
            f"{_plural(len(value['seeds']))}, and still could be chance."
        )
    return steps


def _width(difference: tuple[str, str, dict[str, Any]]) -> float:
    return float(difference[2]["high"] - difference[2]["low"])


def _plural(seeds: int) -> str:
    return f"{seeds} seed{'' if seeds == 1 else 's'}"


def _rates(tuned: list[Arm]) -> list[str]:
    """Where every way of fine-tuning ran at the same one rate, that is nobody's own."""
    modes = {arm.mode for arm in tuned if arm.mode != "merged"}
    rates = {text_of(rate) for arm in tuned if (rate := arm.run.settings.get("finetune.learning_rate")) is not None}
    if len(modes) < 2 or len(rates) != 1:
        return []
    return [
        f"Tune the learning rate of each way of fine-tuning on the dev split (experiment=tune): all ran at "
        f"{rates.pop()}, and one rate seldom suits all."
    ]


def _ways(comparison: Comparison, tuned: list[Arm]) -> list[str]:
    modes = {arm.mode for arm in tuned}
    if not any(arm.run.base for arm in comparison.arms):
        return ["Prune the model (pruning=n2), and fine-tune what is left (finetune=sft,self_distill)."]
    lacking = [mode for mode in ("sft", "self_distill") if mode not in modes]
    if not lacking:
        return []
    return [
        f"Fine-tune with finetune={','.join(lacking)}: references against the model's own rewrites is the question."
    ]


def _sizes(comparison: Comparison) -> list[str]:
    sizes = {arm.run.pruning for arm in comparison.arms if arm.run.base}
    removed = {arm.run.blocks_removed for arm in comparison.arms if arm.run.base}
    if len(sizes) != 1 or None in removed or not (size := max(number or 0 for number in removed)):
        return []
    others = ",".join(f"n{number}" for number in (size - 1, size + 1) if number)
    blocks = f"{size} block{'' if size == 1 else 's'}"
    return [f"Cut other sizes (pruning={others}): with one, {blocks}, nobody sees where quality breaks."]
