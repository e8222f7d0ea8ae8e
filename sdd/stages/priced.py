"""What a recovery is expected to take, in FLOPs, before any of it is built.

By the formulas of `sdd.planning.price`, with a dry run's sizes where a report has counts: a rewrite, a draft and an
answer of the student's own count as long as answers in the teacher's own words (see `Sizes`), no row as too long, no
rewrite as refused.
"""

from dataclasses import replace

from sdd.finetuning.losses import PLAIN
from sdd.planning.price import Price, Recovery, Trained, beside
from sdd.stages import rewrites, rolled, tuned
from sdd.stages.sizes import Sizes
from sdd.stages.tuned import Tuned
from sdd.store import Recipe

Paid = dict[tuple[str, int], float]
"""By a shared artifact and the seed of a draw from it, the rows of that draw that are paid for."""


def expected(sizes: Sizes, recipe: Recipe, paid: Paid) -> Price:
    """Of a recipe of `tuned`; nothing for what is `paid`, where what comes new is added."""
    spec = Tuned.read(recipe.spec)
    rows, epochs = tuned.drawn_rows(sizes, spec), sizes.config.finetune.epochs
    distillation, targets = spec.distillation or {}, recipe.inputs["targets"]
    recovery = Recovery(
        replace(sizes.cut, blocks=sizes.kept),
        sizes.shape,
        sizes.shape_of(distillation.get("teacher", "")),
        _trained(sizes),
        rows=epochs * rows,
        prompt=sizes.prompt,
        target=rolled.target(sizes),
        own=rolled.writes(sizes) * epochs * rows,
        own_tokens=rolled.new(sizes, rows),
        beside=beside(tuned.loss_weights(distillation or {"loss": PLAIN})) if "teacher" in distillation else None,
        damaged=sizes.rows if "damaged" in recipe.inputs else 0,
    )

    def used(shared: Recipe) -> float:
        if recovery.damaged:
            return recovery.damaged
        before = paid.get((shared.address, spec.seed), 0)
        paid[shared.address, spec.seed] = max(before, rows)
        return max(0, rows - before)

    if taught := recipe.inputs.get("taught"):
        recovery = replace(recovery, teacher=sizes.shape_of(taught.spec["model"]), taught=used(taught))
    if made := targets.inputs.get("rewrites"):
        teacher = sizes.shape_of(made.spec["teacher"])
        recovery = replace(recovery, teacher=teacher, used=used(made), rewritten=rewrites.expected(sizes, made))
        recovery = replace(recovery, weighed=targets.spec.get("choice") == "most_likely")
    return recovery.price()


def _trained(sizes: Sizes) -> Trained:
    adapter = sizes.config.adapter
    if adapter.method != "lora":
        return Trained(adapter.method)
    return Trained(weights=tuned.training(sizes).trained, reach=tuned.adapted_blocks(sizes)[1])
