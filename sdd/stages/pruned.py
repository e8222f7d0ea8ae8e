"""Stage `pruned`: a smaller checkpoint. Blocks go before channels; a repair refits what is left at the cut.

What is cut is the unpruned model or, for a cut in steps (arXiv 2106.02241), the input `student`: a model that was cut
before, and recovered.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.importance.channels import kept_channels
from sdd.importance.states import chosen_blocks
from sdd.models.checkpoints import Checkpoint
from sdd.planning import estimates
from sdd.planning.estimates import Estimate
from sdd.pruning.depth import check_names, prune_checkpoint
from sdd.pruning.repair import check_repairable, cuts_of
from sdd.pruning.width import Share, narrow_checkpoint, sizes_of
from sdd.stages import scores as scores_stage
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.stages.student import cut_of, to_cut
from sdd.store import Recipe
from sdd.store.files import read_facts, write_json
from sdd.study import Study


@dataclass(frozen=True)
class ListedBlocks(Spec):
    """Without these blocks; `stored` is the dtype of what is cut, where that is wider than the model's own."""

    model: str
    blocks: list[int]
    stored: str | None = None


@dataclass(frozen=True)
class ScoredBlocks(Spec):
    """Without `size` blocks, which the input `scores` names."""

    model: str
    size: int
    rule: str
    stored: str | None = None


@dataclass(frozen=True)
class Narrowed(Spec):
    """With narrower MLPs, by the channels of the input `scores`; the input `pruned` is narrowed if there is one."""

    model: str
    ratio: float
    ratio_of: str
    multiple: int


@dataclass(frozen=True)
class Repaired(Spec):
    """The input `pruned` with projections refitted at its cuts, on calibration texts."""

    model: str
    repair: str
    penalty: float
    dtype: str
    texts: str
    max_length: int
    source: dict[str, Any] | None = None
    dataset: dict[str, Any] | None = None


SPECS: dict[str, type[Spec]] = {"repair": Repaired, "ratio": Narrowed, "size": ScoredBlocks, "blocks": ListedBlocks}
"""By the setting that tells a way of pruning in a key."""

SCORES = {"metric": str, "num_blocks?": (int, None), "distance?": {str: [(float, None)]}}
CUT = {"removed_blocks": [int], "kept_blocks": [int]}
DEPTH = {"metric": (str, None), "removed_blocks": [int], "kept_blocks": [int], "parameters_before": int}
DEPTH |= {"size": (int, None), "start": (int, None), "score": (float, None)}


def read_spec(recipe: Recipe) -> Spec:
    for setting, kind in SPECS.items():
        if setting in recipe.spec:
            return kind.read(recipe.spec)
    raise UserError("the recipe says nothing of what is pruned; was its manifest edited?")


# ---- what is asked for --------------------------------------------------------------------------------------------


def recipe(study: Study) -> Recipe | None:
    """None where nothing is pruned: the student then starts from the unpruned model."""
    cut, repair, models = _cut(study), study.config.repair, study.models
    if repair.method == "none":
        return cut
    if study.config.pruning.ratio is not None:
        raise UserError(f"repair={repair.method} is for removed blocks only, not for narrower ones; choose repair=none")
    removed = None if cut is None else cut.spec.get("blocks")
    if cut is None or not (removed or cut.spec.get("size")):
        raise UserError(
            f"repair={repair.method} refits what is before removed blocks, and none is removed; add for example "
            "pruning=n2, or choose repair=none"
        )
    if removed:
        cuts_of([block for block in range(models.num_blocks) if block not in removed], removed)
    models.known(lambda: bool(check_repairable(models.checkpoint)), True)
    spec = Repaired(models.digest, repair.method, repair.penalty, **study.calibration.shown)
    return study.recipe("pruned", spec, {"pruned": cut}, cut.labels | study.calibration.labels)


def _cut(study: Study) -> Recipe | None:
    """The pruned model as it comes from the cut, before any repair. Blocks go before channels."""
    pruning, models = study.config.pruning, study.models
    if pruning.ratio is None:
        if study.config.width_metric and (pruning.size or pruning.blocks is not None):
            raise UserError("metric@width_metric scores channels; add pruning.ratio=0.2, or leave it out")
        return _without_blocks(study)
    scores_stage.check_metric(study, scores_stage.width_metric(study), channels=True)
    share = Share(pruning.ratio, pruning.ratio_of, pruning.multiple)
    models.known(lambda: sizes_of(models.checkpoint).width(share, study.blocks_removed), None)
    depth = _without_blocks(study)
    scores = scores_stage.channels_recipe(study, depth)
    spec = Narrowed(models.digest, pruning.ratio, pruning.ratio_of, pruning.multiple)
    inputs = {"scores": scores} if depth is None else {"scores": scores, "pruned": depth}
    both = "+".join(scored.labels["metric"] for scored in (depth, scores) if scored and "metric" in scored.labels)
    return study.recipe("pruned", spec, inputs, {"metric": both})


def further(study: Study) -> Recipe | None:
    """The student that is cut further; None where the unpruned model is cut."""
    from sdd.stages import tuned  # which is made of what is cut

    if (before := study.before) is None:
        return None
    try:
        if before.models.digest != study.models.digest:
            raise UserError("it has another model; choose the model for the whole command")
        if before.config.pruning.ratio is not None:
            raise UserError("its channels are cut, and only blocks can be cut in steps; leave pruning.ratio out")
        student = recipe(before) if before.config.finetune.mode == "none" else tuned.recipe(before)
        if student is None:
            raise UserError("it is the unpruned model; leave pruning.after out, or cut or fine-tune there")
    except UserError as error:
        raise UserError(f"pruning.after: {error}") from None
    return student


def _stored(study: Study, student: Recipe) -> str | None:
    """The dtype that an adapter is folded into its base in, where that is wider than the base's."""
    adapted = student.stage == "tuned" and student.spec["adapter"].get("method") != "full"
    return study.models.wider if adapted else None


def _without_blocks(study: Study) -> Recipe | None:
    """The model without the blocks that go; None where none does."""
    pruning, models = study.config.pruning, study.models
    if pruning.size or pruning.blocks is not None:
        models.known(lambda: check_names(models.checkpoint), None)
    blocks = None if pruning.blocks is None else sorted(pruning.blocks)
    if pruning.start is not None:
        blocks = list(range(pruning.start, pruning.start + pruning.size))
    student = further(study)
    inputs = {} if student is None else {"student": student}
    stored = None if student is None else _stored(study, student)
    if blocks is not None:
        return study.recipe("pruned", ListedBlocks(models.digest, blocks, stored), inputs, {})
    if pruning.size == 0:
        return None
    depth = study.config.metric.get("depth") or pruning.size
    if pruning.size > depth:
        raise UserError(
            f"pruning.size={pruning.size}, but metric.depth={depth} removals are measured; raise metric.depth"
        )
    scores = scores_stage.recipe(study, student, stored)
    spec = ScoredBlocks(models.digest, pruning.size, "lowest", stored)
    return study.recipe("pruned", spec, {"scores": scores} | inputs, scores.labels)


LESS = ("trainer.inference_batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    spec = read_spec(recipe)
    if isinstance(spec, Repaired):
        texts, batch = sizes.config.calibration.num_texts, sizes.setting("trainer.inference_batch_size")
        whole, length = sizes.cost_model(sizes.shape.blocks, sizes.config.model.dtype), sizes.text_tokens(spec.texts)
        return estimates.repaired(whole, sizes.cost_model(sizes.kept, sizes.stored), texts, length, batch)
    if isinstance(spec, Narrowed):
        return estimates.pruned(sizes.student(sizes.stored))
    return estimates.pruned(sizes.cost_model(sizes.kept, sizes.stored))


# ---- building -----------------------------------------------------------------------------------------------------


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """The checkpoint, and `pruning.json`."""
    spec = read_spec(recipe)
    if isinstance(spec, Repaired):
        _build_repaired(runtime, spec, Checkpoint(inputs["pruned"]), folder)
    elif isinstance(spec, Narrowed):
        _build_narrowed(runtime, spec, inputs, folder)
    elif isinstance(spec, ScoredBlocks):
        scores = read_facts(inputs["scores"] / "scores.json", SCORES)
        try:
            removed, score = chosen_blocks(scores, spec.size)
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"{inputs['scores']}/scores.json says nothing of {spec.size} blocks") from None
        with to_cut(inputs, spec.model, spec.stored, runtime, folder) as source:
            _without(source, removed, folder, scores["metric"], score, inputs)
    elif isinstance(spec, ListedBlocks):
        with to_cut(inputs, spec.model, spec.stored, runtime, folder) as source:
            _without(source, spec.blocks, folder, None, None, inputs)


def _without(
    source: Checkpoint,
    removed: list[int],
    folder: Path,
    metric: str | None,
    score: float | None,
    inputs: Mapping[str, Path],
) -> None:
    facts = prune_checkpoint(source, folder, removed)
    if "student" in inputs:
        facts = in_all(facts, cut_of(inputs["student"]))
        removed = facts["removed_blocks"]
    contiguous = bool(removed) and removed == list(range(removed[0], removed[0] + len(removed)))
    write_json(
        folder / "pruning.json",
        {
            "kind": "depth",
            "metric": metric,
            "size": len(removed),
            "start": removed[0] if contiguous else None,
            "score": score,
            **facts,
        },
    )


def in_all(facts: dict[str, Any], earlier: Path | None) -> dict[str, Any]:
    """What is said of a cut of a student, counted from the unpruned model; `removed_of_student` is this cut alone.

    `earlier` is the pruned artifact that the student was made from, if it was cut.
    """
    whole = {"removed_blocks": [], "kept_blocks": sorted([*facts["kept_blocks"], *facts["removed_blocks"]])}
    cut: dict[str, Any] = facts | whole if earlier is None else read_facts(earlier / "pruning.json", DEPTH)
    kept, before = cut["kept_blocks"], cut["parameters_before"]
    removed = facts["removed_blocks"]
    return facts | {
        "removed_blocks": sorted([*cut["removed_blocks"], *(kept[block] for block in removed)]),
        "kept_blocks": [kept[block] for block in facts["kept_blocks"]],
        "removed_of_student": removed,
        "parameters_before": before,
        "flops_saved": (before - facts["parameters_after"]) / before,
    }


def _build_narrowed(runtime: Runtime, spec: Narrowed, inputs: Mapping[str, Path], folder: Path) -> None:
    """`removed_of_all` and `removed_of_mlp` are shares of the model that was narrowed; where blocks went before,
    `parameters_before` and `flops_saved` count from the unpruned model, and what is said of blocks is the depth cut's.
    """
    source = Checkpoint(inputs["pruned"]) if "pruned" in inputs else runtime.checkpoint(spec.model)
    sizes = sizes_of(source)
    width = sizes.width(Share(spec.ratio, spec.ratio_of, spec.multiple))
    kept = [kept_channels(importance.tolist(), width) for importance in scores_stage.read_channels(inputs["scores"])]
    facts = narrow_checkpoint(source, folder, kept)
    metric = read_facts(inputs["scores"] / "scores.json", {"metric": str})["metric"]
    cut: dict[str, Any] = {"kind": "width", "metric": metric, "size": None, "start": None, "score": None}
    cut |= {"removed_blocks": [], "kept_blocks": list(range(sizes.num_blocks))}
    if "pruned" in inputs:
        depth = read_facts(inputs["pruned"] / "pruning.json", DEPTH)
        cut |= {key: depth[key] for key in cut if key not in ("kind", "metric")}
        cut |= {"kind": "depth+width", "metric": "+".join(name for name in (depth["metric"], metric) if name)}
        facts["parameters_before"] = depth["parameters_before"]
        facts["flops_saved"] = 1 - facts["parameters_after"] / depth["parameters_before"]
    write_json(folder / "pruning.json", cut | {"ratio": spec.ratio, "ratio_of": spec.ratio_of} | facts)


def _build_repaired(runtime: Runtime, spec: Repaired, pruned: Checkpoint, folder: Path) -> None:
    """The pruned checkpoint with some of its projections replaced; its `pruning.json`, and what the repair did."""
    from sdd.forward.batches import tokenize_texts
    from sdd.pruning.repair import repair, replace_tensors

    facts = read_facts(pruned.folder / "pruning.json", CUT)
    source = runtime.checkpoint(spec.model)
    rows = tokenize_texts(source.tokenizer(), runtime.texts[spec.texts], spec.max_length)
    how = spec.dtype, runtime.device, runtime.attention, runtime.inference_batch_size
    tensors, done = repair(source, pruned, facts, rows, spec.penalty, *how)
    replace_tensors(pruned, folder, tensors)
    done = {"method": spec.repair, "penalty": spec.penalty, "texts": spec.texts, **done}
    write_json(folder / "pruning.json", {**facts, "repair": done})
