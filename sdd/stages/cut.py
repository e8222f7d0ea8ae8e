"""Stages `scores` and `pruned`: from a model and texts to a smaller checkpoint."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdd.config.allowed import build
from sdd.errors import UserError
from sdd.forward.bypass import Row, task_row
from sdd.importance.channels import ChannelCriterion
from sdd.importance.states import ModelCriterion, chosen_blocks
from sdd.models import checkpoints
from sdd.pruning.depth import check_prunable, prune_checkpoint
from sdd.stages.figures import heat_map
from sdd.stages.rows import read_examples
from sdd.stages.runtime import Runtime, read_facts, write_json
from sdd.stages.width import build_channel_scores, build_narrowed
from sdd.store import Recipe

SCORES = {"metric": str, "num_blocks?": (int, None), "distance?": {str: [(float, None)]}}
CUT = {"removed_blocks": [int], "kept_blocks": [int]}

log = logging.getLogger(__name__)


def build_scores(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`scores.json` and a heat map, after as many passes over the texts as the criterion takes."""
    spec = recipe.spec
    criterion = build(spec["metric"])
    if isinstance(criterion, ChannelCriterion):
        build_channel_scores(runtime, recipe, inputs, folder, criterion)
        return
    blocks, num_texts = spec.get("num_blocks"), 0
    if criterion.needs == "nothing":
        criterion.start(blocks)
    else:
        source = runtime.source(spec["model"], "model")
        blocks = checkpoints.num_blocks(source)
        if blocks > 1:
            check_prunable(source, [blocks - 1])  # a model that bears no cut is refused before it is looked at
        criterion.start(blocks)
    if criterion.needs == "weights":
        criterion.read(source)
    elif criterion.needs != "nothing":
        from sdd.forward.batches import show_texts

        rows = _task_rows(runtime, spec) if criterion.needs == "rows" else _text_rows(runtime, spec)
        num_texts = len(rows)
        model = checkpoints.load_model(source, spec["dtype"], runtime.device, runtime.attention)
        if isinstance(criterion, ModelCriterion):
            criterion.measure(model, rows, runtime.inference_batch_size)
        else:
            show_texts(model, criterion, [row.ids for row in rows], runtime.inference_batch_size)
    scores = {"metric": criterion.name, "num_blocks": blocks, "num_texts": num_texts, **criterion.scores()}
    write_json(folder / "scores.json", scores)
    heat_map(scores, folder / "scores.png")


def _text_rows(runtime: Runtime, spec: dict[str, Any]) -> list[Row]:
    """The calibration texts, every token of them but the first to be scored."""
    from sdd.forward.batches import tokenize_texts

    tokenizer = checkpoints.load_tokenizer(runtime.source(spec["model"], "model"))
    return [Row(ids) for ids in tokenize_texts(tokenizer, runtime.texts[spec["texts"]], spec["max_length"])]


def _task_rows(runtime: Runtime, spec: dict[str, Any]) -> list[Row]:
    """The first fine-tuning rows as chats, those left out that are too long."""
    tokenizer = checkpoints.load_tokenizer(runtime.source(spec["model"], "model"))
    examples = read_examples(runtime, spec["dataset"])[: spec["num_rows"]]
    rows = [task_row(tokenizer, e.prompt, e.reference, e.answer, spec["system_prompt"]) for e in examples]
    short = [row for row in rows if len(row.ids) <= spec["max_length"]]
    if not short:
        raise UserError(
            f"calibration.max_length={spec['max_length']}: all {len(rows)} rows of the dataset are longer; raise "
            "calibration.max_length"
        )
    if len(short) < len(rows):
        log.info(
            "scores: %d of %d rows left out, longer than %d tokens",
            len(rows) - len(short),
            len(rows),
            spec["max_length"],
        )
    return short


def build_pruned(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """The checkpoint without the chosen blocks, and `pruning.json`; or such a one, repaired at its cuts."""
    spec = recipe.spec
    if "repair" in spec:
        _build_repaired(runtime, recipe, inputs["pruned"], folder)
        return
    if "ratio" in spec:
        build_narrowed(runtime, recipe, inputs, folder)
        return
    metric, score = None, None
    if "scores" in inputs:
        scores = read_facts(inputs["scores"] / "scores.json", SCORES)
        try:
            removed, score = chosen_blocks(scores, spec["size"])
        except (KeyError, IndexError, TypeError, ValueError):
            raise UserError(f"{inputs['scores']}/scores.json says nothing of {spec['size']} blocks") from None
        metric = scores["metric"]
    else:
        removed = spec["blocks"]
    facts = prune_checkpoint(runtime.source(spec["model"], "model"), folder, removed)
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


def _build_repaired(runtime: Runtime, recipe: Recipe, pruned: Path, folder: Path) -> None:
    """The pruned checkpoint with some of its projections replaced; its `pruning.json`, and what the repair did."""
    from sdd.forward.batches import tokenize_texts
    from sdd.pruning.repair import repair, replace_tensors

    spec = recipe.spec
    facts = read_facts(pruned / "pruning.json", CUT)
    source = runtime.source(spec["model"], "model")
    rows = tokenize_texts(checkpoints.load_tokenizer(source), runtime.texts[spec["texts"]], spec["max_length"])
    how = spec["dtype"], runtime.device, runtime.attention, runtime.inference_batch_size
    tensors, done = repair(source, pruned, facts, rows, spec["penalty"], *how)
    replace_tensors(pruned, folder, tensors)
    done = {"method": spec["repair"], "penalty": spec["penalty"], "texts": spec["texts"], **done}
    write_json(folder / "pruning.json", {**facts, "repair": done})
