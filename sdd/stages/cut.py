"""Stages `scores` and `pruned`: from a model and texts to a smaller checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path

from sdd import models
from sdd.allowed import build
from sdd.importance import chosen_blocks
from sdd.pruning import check_prunable, prune_checkpoint
from sdd.stages.figures import heat_map
from sdd.stages.runtime import Runtime, write_json
from sdd.store import Recipe


def build_scores(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """One pass over the texts; `scores.json` and a heat map."""
    spec = recipe.spec
    criterion = build(spec["metric"])
    num_texts = 0
    if criterion.needs_texts:
        from sdd.calibrate import show_texts, tokenize_texts

        source = runtime.source(spec["model"], "model")
        if (last := models.num_blocks(source) - 1) > 0:
            check_prunable(source, [last])  # a model that bears no cut is refused before the pass over the texts
        texts = runtime.texts[spec["texts"]]
        rows = tokenize_texts(models.load_tokenizer(source), texts, spec["max_length"])
        num_texts = len(rows)
        criterion.start(models.num_blocks(source))
        model = models.load_model(source, spec["dtype"], runtime.device, runtime.attention)
        show_texts(model, criterion, rows, runtime.inference_batch_size)
        blocks = models.num_blocks(source)
    else:
        blocks = spec["num_blocks"]
        criterion.start(blocks)
    scores = {"metric": criterion.name, "num_blocks": blocks, "num_texts": num_texts, **criterion.scores()}
    write_json(folder / "scores.json", scores)
    heat_map(scores, folder / "scores.png")


def build_pruned(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """The checkpoint without the chosen blocks, and `pruning.json`."""
    spec = recipe.spec
    metric, score = None, None
    if "scores" in inputs:
        scores = json.loads((inputs["scores"] / "scores.json").read_text())
        removed, score = chosen_blocks(scores, spec["size"])
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
