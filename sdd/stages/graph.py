"""The map of the house: a study becomes a graph of recipes.

teacher -> scores -> pruned; dataset -> rewrites (of references, or of what the pruned model answered) -> targets;
pruned + targets -> tuned; tuned ones -> merged; any of them -> evaluated, or analysed: answered (by teacher and
student) -> drafted, shifted; targets -> surprisals -> shifted; measured. Rows may be drawn by what the cut took from
them: surprisals + pruned -> damaged -> tuned. The teacher's logits may be kept: targets -> taught -> tuned. What is in
a key is decided in each stage's file and nowhere else.
"""

from importlib import import_module

from sdd.errors import UserError
from sdd.stages import answered, draws, evaluated, merged, pruned, targets, tuned
from sdd.store import ANALYSES, Recipe
from sdd.study import Study
from sdd.study.calibration import EMBEDDED_TEXTS
from sdd.study.rows import EMBEDDED


def student(study: Study) -> Recipe | None:
    """What is evaluated: merged, tuned or pruned; None for the unpruned model itself."""
    if study.config.merge.method != "none":
        return merged.recipe(study)
    return pruned.recipe(study) if study.config.finetune.mode == "none" else tuned.recipe(study)


def wanted(study: Study, script: str) -> Recipe | None:
    """The artifact that a script is asked for; None where that is the unpruned model itself."""
    if script == "prune":
        return pruned.recipe(study)
    if script == "generate":
        return targets.recipe(study)
    if script == "train":
        return student(study)
    kind, own = study.config.analysis.kind, student(study)
    if kind == "none":
        return evaluated.recipe(study, own)
    if own is None:
        raise UserError(f"analysis={kind} compares a student with the unpruned model; add for example pruning=n2")
    asked: Recipe = import_module(f"sdd.stages.{ANALYSES[kind]}").recipe(study, own)
    return asked


LARGEST_VOCABULARY = 8_192
"""Tokens of a model that the embedded tasks are for: theirs has 768, public models have 32 thousand and more."""


def embedded_groups(study: Study, recipes: list[Recipe] | None) -> list[str]:
    """The groups by which a model that is not of the embedded one's kind would be given embedded texts or tasks.

    Of what the recipes use; of all that the config names where there are none yet (None).
    """
    vocabulary, config = study.models.sizes.get("vocab_size"), study.config
    if not isinstance(vocabulary, int) or vocabulary <= LARGEST_VOCABULARY:
        return []
    embedded = {
        "calibration": config.calibration._target_ == EMBEDDED_TEXTS,
        "dataset": any(part._target_ == EMBEDDED for one in [study, *study.others] for part in one.rows.parts),
        "evaluation": config.evaluation.suite == "tiny",
    }
    if recipes is not None:
        stages = {recipe.stage for recipe in recipes}
        embedded["calibration"] &= any("texts" in recipe.spec for recipe in recipes)
        embedded["dataset"] &= bool(stages & {"rewrites", "targets", "answered"})
        embedded["evaluation"] &= "evaluated" in stages
    return [group for group, is_embedded in embedded.items() if is_embedded]


def read_data(study: Study, missing: list[Recipe]) -> None:
    """Read what building the recipes needs, so that what is wrong with it is said before any work.

    Recipes name what lies on the hub without asking it; this is where it is asked.
    """
    for one in study.students:
        own = {recipe.address for recipe in tuned.recipe(one).walk()}
        read_data(one, [recipe for recipe in missing if recipe.address in own])
        study.texts |= one.texts
    if study.before is not None and not study.students and (first := pruned.further(study)) is not None:
        own = {recipe.address for recipe in first.walk()}
        read_data(study.before, [recipe for recipe in missing if recipe.address in own])
    stages = {recipe.stage for recipe in missing}
    if any(recipe.stage == "answered" and recipe.spec["held_out"] for recipe in missing):
        answered.check_held_out(study, len(study.prompts.source.examples()))
    if stages & {"rewrites", "targets"} and not study.students:
        examples = study.rows.source.examples()
        tuned.check_turns(study, examples)
        if "tuned" in stages:
            tuned.check_rows(study, len(examples))
            tuned.check_lengths(study, examples)
            draws.check_domains(study.config.finetune, examples)
    if "taught" in stages or any("teacher" in recipe.spec.get("distillation", {}) for recipe in missing):
        tuned.check_vocabulary(study)
    if any("texts" in recipe.spec for recipe in missing) and not study.students:
        study.texts[study.calibration.spec["texts"]] = study.calibration.source.texts()
    if "evaluated" in stages and stages != {"evaluated"} and study.config.evaluation.suite != "tiny":
        evaluated.check_rows(study)
