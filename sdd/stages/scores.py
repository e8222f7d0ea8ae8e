"""Stage `scores`: how important every block, or every MLP channel, is by one criterion."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd.config import plain
from sdd.config.allowed import build as build_part
from sdd.errors import UserError
from sdd.forward import ranks
from sdd.forward.bypass import Row, task_row
from sdd.importance.channels import SDM, TaylorWidth
from sdd.importance.criteria import (
    Blind,
    BlindChannels,
    BlockCriterion,
    ChannelCriterion,
    Criterion,
    ModelCriterion,
    OfRows,
    OfTexts,
    OfWeights,
    StateCriterion,
    TextChannels,
    WeightChannels,
    WeightCriterion,
)
from sdd.models.checkpoints import Checkpoint, check_logits
from sdd.planning import estimates
from sdd.planning.estimates import Estimate
from sdd.pruning.depth import check_prunable
from sdd.pruning.width import check_narrowable, sizes_of
from sdd.stages.datasets import read_examples
from sdd.stages.figures import channel_curves, heat_map
from sdd.stages.runtime import Runtime
from sdd.stages.sharing import shared
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.stages.student import to_cut
from sdd.store import SCRATCH, Recipe
from sdd.store.files import write_json
from sdd.study import Study

if TYPE_CHECKING:
    from sdd.forward.row_states import RowStates

log = logging.getLogger(__name__)

CHANNELS = "channels.safetensors"
"""A float32 vector of length intermediate_size a block under the keys "0", "1", ...; higher is more important."""
GRADIENTS = {"sdd.channels.TaylorWidth": 1, "sdd.channels.SDM": 2}
"""Criteria measured by passes back as well, and what they cost: the second has the teacher's passes beside."""


@dataclass(frozen=True)
class BlindScores(Spec):
    """Of a criterion that looks at nothing but sizes."""

    metric: dict[str, Any]
    num_blocks: int
    intermediate_size: int | None = None


@dataclass(frozen=True)
class WeightScores(Spec):
    """Of a criterion that reads weights; `model` is absent where the input `pruned` or `student` is scored.

    `stored` is the dtype of a student's weights, where that is wider than its base's.
    """

    metric: dict[str, Any]
    model: str | None = None
    stored: str | None = None


@dataclass(frozen=True)
class TextScores(Spec):
    """Of a criterion that is shown calibration texts, whose digest is `texts`."""

    metric: dict[str, Any]
    dtype: str
    texts: str
    max_length: int
    model: str | None = None
    source: dict[str, Any] | None = None
    dataset: dict[str, Any] | None = None
    stored: str | None = None


@dataclass(frozen=True)
class RowScores(Spec):
    """Of a criterion that is shown the first of the fine-tuning rows, in chats of at most `max_length` tokens."""

    metric: dict[str, Any]
    dtype: str
    dataset: dict[str, Any]
    num_rows: int
    max_length: int
    system_prompt: str | None
    chat_template: str | None = None
    model: str | None = None
    stored: str | None = None


Scores = BlindScores | WeightScores | TextScores | RowScores

SPECS: dict[type[Criterion], type[Scores]] = {
    Blind: BlindScores,
    OfWeights: WeightScores,
    OfTexts: TextScores,
    OfRows: RowScores,
}
"""By what a criterion looks at."""


def read_spec(recipe: Recipe, criterion: Criterion) -> Scores:
    (spec,) = (spec for kind, spec in SPECS.items() if isinstance(criterion, kind))
    return spec.read(recipe.spec)


# ---- what is asked for --------------------------------------------------------------------------------------------


def recipe(study: Study, student: Recipe | None = None, stored: str | None = None) -> Recipe:
    """Scores of blocks by the config's `metric`: the unpruned model's, or those of a student that is cut further.

    `stored` is the dtype that the student's adapter is folded into its base in, if that is wider.
    """
    check_metric(study, "metric", channels=False)
    config, models, calibration = study.config, study.models, study.calibration
    metric = plain(config.metric)
    criterion = build_part(metric)
    labels = {"metric": criterion.name}
    if isinstance(criterion, Blind):
        return study.recipe("scores", BlindScores(metric, study.num_blocks), {}, labels)
    model, inputs = (models.digest, {}) if student is None else (None, {"student": student})
    if isinstance(criterion, OfWeights):
        return study.recipe("scores", WeightScores(metric, model, stored), inputs, labels)
    if isinstance(criterion, OfRows):
        spec = RowScores(
            metric=metric,
            model=model,
            stored=stored,
            dtype=config.model.dtype,
            dataset=study.rows.spec,
            num_rows=calibration.num_texts,
            max_length=config.calibration.max_length,
            system_prompt=config.dataset.system_prompt,
            chat_template=models.plain_template(models.digest),
        )
        return study.recipe("scores", spec, inputs, labels)
    shown = TextScores(metric=metric, model=model, stored=stored, **calibration.shown)
    return study.recipe("scores", shown, inputs, labels | calibration.labels)


def channels_recipe(study: Study, depth: Recipe | None) -> Recipe:
    """Scores of MLP channels, of the unpruned model or of the one without blocks, `depth`."""
    config, models, calibration = study.config, study.models, study.calibration
    node = plain(config[width_metric(study)])
    criterion = build_part(node)
    labels, inputs = {"metric": criterion.name}, {} if depth is None else {"pruned": depth}
    own = None if depth else models.digest
    if isinstance(criterion, Blind):
        blocks, width = study.blocks_left, int(models.sizes["intermediate_size"])
        return study.recipe("scores", BlindScores(node, blocks, width), {}, labels)
    if isinstance(criterion, SDM | TaylorWidth) and config.model.dtype == "float16":
        raise UserError(
            f"metric={criterion.name} takes gradients, which float16 rounds to zero; set model.dtype=bfloat16"
        )
    if isinstance(criterion, OfWeights):
        return study.recipe("scores", WeightScores(node, own), inputs, labels)
    labels |= calibration.labels
    if not isinstance(criterion, SDM):
        return study.recipe("scores", TextScores(metric=node, model=own, **calibration.shown), inputs, labels)
    first = TextScores(metric={"_target_": "sdd.channels.TaylorWidth"}, model=own, **calibration.shown)
    stage1 = study.recipe("scores", first, inputs, labels | {"metric": TaylorWidth.name})
    node |= criterion.resolved(config.pruning.ratio, config.pruning.ratio_of)
    second = TextScores(metric=node, model=models.digest, **calibration.shown)
    return study.recipe("scores", second, inputs | {"first": stage1}, labels)


def width_metric(study: Study) -> str:
    """The node that names the criterion of a width cut."""
    pruning = study.config.pruning
    alone = not pruning.size or pruning.start is not None or pruning.blocks is not None
    return "metric" if alone and not study.config.width_metric else "width_metric"


def check_metric(study: Study, node: str, channels: bool) -> None:
    """Refuse a criterion of blocks for a cut of channels, and the reverse."""
    pruning, given = study.config.pruning, study.config[node]
    if not given:
        raise UserError(
            f"pruning.size={pruning.size} and pruning.ratio={pruning.ratio} need a criterion each; add for "
            "example metric=angular metric@width_metric=sdm"
        )
    criterion = build_part(given)
    if isinstance(criterion, ChannelCriterion) == channels:
        return
    name = f"{'metric@' if node != 'metric' else ''}{node}={criterion.name}"
    if channels:
        raise UserError(
            f"{name} scores blocks, but pruning.ratio={pruning.ratio:g} removes MLP channels; choose one of "
            "sdm, taylor_width, activation_width, magnitude_width, random_width, or prune blocks (pruning=n2)"
        )
    raise UserError(
        f"{name} scores MLP channels, but pruning.size={pruning.size} removes blocks; choose a criterion of blocks "
        "such as metric=angular (for channels beside it metric@width_metric=sdm), or pruning=mlp20"
    )


LESS = ("trainer.inference_batch_size", "trainer.micro_batch_tokens")
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    criterion = build_part(recipe.spec["metric"])
    spec = read_spec(recipe, criterion)
    if isinstance(spec, BlindScores):
        return Estimate(1.0, 1e8, 1e5, on_cpu=True)
    batch, whole = sizes.setting("trainer.inference_batch_size"), sizes.start
    if isinstance(criterion, ChannelCriterion):
        blocks = sizes.kept if "pruned" in recipe.inputs else whole
        if not isinstance(spec, TextScores):
            return estimates.weights_read(sizes.cost_model(blocks, sizes.stored))
        cost_model, length = sizes.cost_model(blocks, sizes.config.model.dtype), sizes.text_tokens(spec.texts)
        texts, kind = sizes.config.calibration.num_texts, spec.metric["_target_"]
        if kind in GRADIENTS:
            micro = sizes.setting("trainer.micro_batch_tokens")
            return estimates.gradient_scores(cost_model, texts, length, micro, GRADIENTS[kind])
        return estimates.scores(cost_model, texts, length, batch)
    if isinstance(spec, WeightScores):
        return estimates.weights_read(sizes.cost_model(whole, sizes.stored))
    if isinstance(spec, TextScores):
        texts, length = sizes.num_texts, sizes.text_tokens(spec.texts)
    else:
        texts, length = min(sizes.num_texts, sizes.rows), sizes.prompt + sizes.answer
    runs = criterion.runs(whole) if isinstance(criterion, ModelCriterion) else ()
    cost_model = sizes.cost_model(whole, sizes.config.model.dtype)
    return estimates.scores(cost_model, texts, length, batch, *runs)


# ---- building -----------------------------------------------------------------------------------------------------


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`scores.json` and a figure, after as many passes over the texts as the criterion takes; of channels, also
    `channels.safetensors`. Sums over texts survive a kill."""
    criterion = build_part(recipe.spec["metric"])
    spec = read_spec(recipe, criterion)
    if criterion.splits and "student" not in inputs and shared(build, runtime, recipe, inputs, folder):
        return
    criterion.scratch = folder / SCRATCH
    criterion.scratch.mkdir(exist_ok=True)
    if isinstance(criterion, ChannelCriterion):
        _build_channels(runtime, spec, inputs, folder, criterion)
    else:
        _build_blocks(runtime, spec, inputs, folder, criterion)


def _build_blocks(
    runtime: Runtime, spec: Scores, inputs: Mapping[str, Path], folder: Path, criterion: BlockCriterion
) -> None:
    num_texts = 0
    if isinstance(spec, BlindScores):
        blocks = spec.num_blocks
        criterion.start(blocks)
    else:
        with to_cut(inputs, spec.model, spec.stored, runtime, folder) as source:
            blocks = source.num_blocks
            if blocks > 1:
                check_prunable(source, [blocks - 1])  # a model that bears no cut is refused before it is looked at
            criterion.start(blocks)
            if isinstance(criterion, WeightCriterion):
                criterion.read(source)
            else:
                assert isinstance(spec, TextScores | RowScores), f"{criterion.name} reads no weights"
                num_texts = _show(runtime, spec, source, criterion)
                if ranks.rank() > 0:
                    return
    scores = {"metric": criterion.name, "num_blocks": blocks, "num_texts": num_texts, **criterion.scores()}
    write_json(folder / "scores.json", scores)
    heat_map(scores, folder / "scores.png")


def _show(runtime: Runtime, spec: TextScores | RowScores, source: Checkpoint, criterion: BlockCriterion) -> int:
    """Let the criterion look at the model; -> how many texts or rows it was shown."""
    from sdd.forward.batches import show_texts

    tokenizer = source.tokenizer()
    rows = _task_rows(runtime, spec, tokenizer) if isinstance(spec, RowScores) else _text_rows(runtime, spec, tokenizer)
    model = source.model(spec.dtype, runtime.placed, runtime.attention)
    if isinstance(criterion, ModelCriterion):
        criterion.measure(model, rows, runtime.inference_batch_size)
    else:
        assert isinstance(criterion, StateCriterion), f"{criterion.name} is told of no states"
        show_texts(
            model,
            criterion,
            [row.ids for row in rows],
            runtime.inference_batch_size,
            kept=criterion.kept("scores"),
        )
    return len(rows)


def _text_rows(runtime: Runtime, spec: TextScores, tokenizer: Any) -> list[Row]:
    """The calibration texts, every token of them but the first to be scored."""
    from sdd.forward.batches import tokenize_texts

    return [Row(ids) for ids in tokenize_texts(tokenizer, runtime.texts[spec.texts], spec.max_length)]


def _task_rows(runtime: Runtime, spec: RowScores, tokenizer: Any) -> list[Row]:
    """The first fine-tuning rows as chats, those left out that are too long."""
    examples = read_examples(runtime, spec.dataset)[: spec.num_rows]
    rows = [task_row(tokenizer, e.prompt, e.reference, e.answer, spec.system_prompt, e.before) for e in examples]
    short = [row for row in rows if len(row.ids) <= spec.max_length]
    if not short:
        raise UserError(
            f"calibration.max_length={spec.max_length}: all {len(rows)} rows of the dataset are longer; raise "
            "calibration.max_length"
        )
    if len(short) < len(rows):
        left_out = len(rows) - len(short)
        log.info("scores: %d of %d rows left out, longer than %d tokens", left_out, len(rows), spec.max_length)
    return short


def _build_channels(
    runtime: Runtime, spec: Scores, inputs: Mapping[str, Path], folder: Path, criterion: ChannelCriterion
) -> None:
    """Where blocks went first, the input `pruned` is scored."""
    import torch
    from safetensors.torch import save_file

    rows: list[list[int]] = []
    importance: Sequence[Any]
    if isinstance(criterion, BlindChannels):
        assert isinstance(spec, BlindScores) and spec.intermediate_size is not None
        importance = criterion.draw(spec.num_blocks, spec.intermediate_size)
    else:
        assert not isinstance(spec, BlindScores | RowScores), f"{criterion.name} looks at weights or texts"
        source = Checkpoint(inputs["pruned"]) if "pruned" in inputs else runtime.checkpoint(str(spec.model))
        check_narrowable(source, sizes_of(source).mlp.width - 1)
        if isinstance(spec, TextScores):
            from sdd.forward.batches import tokenize_texts

            rows = tokenize_texts(source.tokenizer(), runtime.texts[spec.texts], spec.max_length)
            importance = _measured(runtime, spec, inputs, source, criterion, rows, folder)
            if ranks.rank() > 0:
                return
        else:
            assert isinstance(criterion, WeightChannels), f"{criterion.name} reads no weights"
            importance = criterion.read(source)
    vectors = {str(block): torch.as_tensor(vector).float().contiguous() for block, vector in enumerate(importance)}
    save_file(vectors, folder / CHANNELS)
    scores = {
        "metric": criterion.name,
        "num_blocks": len(vectors),
        "num_texts": len(rows),
        "intermediate_size": len(vectors["0"]),
        "direction": "higher is more important",
        **{key: value for key, value in spec.metric.items() if key != "_target_"},
    }
    write_json(folder / "scores.json", scores)
    curves = [vectors[str(block)].tolist() for block in range(len(vectors))]
    channel_curves(curves, criterion.name, len(rows), folder / "scores.png")


def _measured(
    runtime: Runtime,
    spec: TextScores,
    inputs: Mapping[str, Path],
    source: Checkpoint,
    criterion: ChannelCriterion,
    rows: list[list[int]],
    folder: Path,
) -> list[Any]:
    """Importance from passes over the texts; the second stage of SDMPrune has the first one's and a teacher."""

    def opened(checkpoint: Checkpoint) -> Any:
        model = checkpoint.model(spec.dtype, runtime.device, runtime.attention)
        check_logits(model)
        return model

    model = opened(source)
    if isinstance(criterion, SDM | TaylorWidth):
        criterion.final_states = _final_states(runtime, spec, rows, folder)
    if not isinstance(criterion, SDM):
        assert isinstance(criterion, TextChannels), f"{criterion.name} is shown no texts"
        return criterion.measure(model, rows, runtime.micro_batch_tokens)
    teacher = opened(runtime.checkpoint(str(spec.model))) if "pruned" in inputs else None
    return criterion.measure(model, rows, runtime.micro_batch_tokens, read_channels(inputs["first"]), teacher)


_last: "dict[tuple[Any, ...], RowStates]" = {}
"""What `_final_states` gave last, by what it is of."""


def _final_states(runtime: Runtime, spec: TextScores, rows: list[list[int]], folder: Path) -> "RowStates | None":
    """Where passes of the uncut model leave its final states on the texts for the next ones of this process; one such
    place at a time. None where no uncut model is passed, or several ranks share the texts.

    It lies beside the artifact, which NFS would not let be published while a file in it is open.
    """
    from sdd.forward.row_states import RowStates

    if spec.model is None or ranks.is_rank():
        return None
    shape = runtime.device, runtime.attention, runtime.micro_batch_tokens
    key = spec.model, spec.dtype, spec.texts, spec.max_length, *shape
    if key not in _last:
        _last.clear()
        _last[key] = RowStates([len(row) for row in rows], folder.parent)
    return _last[key]


def read_channels(folder: Path) -> list[Any]:
    """The importance of every block's channels in a scores artifact."""
    from safetensors.torch import load_file

    vectors = load_file(folder / CHANNELS)
    return [vectors[str(block)] for block in range(len(vectors))]
