"""Stages `scores` and `pruned` where channels are scored and removed instead of blocks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdd.importance.channels import SDM, kept_channels
from sdd.models import checkpoints
from sdd.pruning.width import Share, check_narrowable, narrow_checkpoint, sizes_of
from sdd.stages.figures import channel_curves
from sdd.stages.runtime import Runtime, read_facts, write_json
from sdd.store import Recipe

CHANNELS = "channels.safetensors"
"""A float32 vector of length intermediate_size a block under the keys "0", "1", ...; higher is more important."""


def build_channel_scores(
    runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path, criterion: Any
) -> None:
    """`channels.safetensors`, `scores.json` and a figure. Where blocks went first, the input `pruned` is scored."""
    import torch
    from safetensors.torch import save_file

    spec = recipe.spec
    rows: list[list[int]] = []
    if criterion.needs == "nothing":
        found = criterion.draw(spec["num_blocks"], spec["intermediate_size"])
    else:
        source = inputs["pruned"] if "pruned" in inputs else runtime.source(spec["model"], "model")
        check_narrowable(source, sizes_of(source).mlp.width - 1)
        if criterion.needs == "texts":
            from sdd.forward.batches import tokenize_texts

            texts = runtime.texts[spec["texts"]]
            rows = tokenize_texts(checkpoints.load_tokenizer(source), texts, spec["max_length"])
            found = _measured(runtime, spec, inputs, source, criterion, rows)
        else:
            found = criterion.read(source)
    vectors = {str(block): torch.as_tensor(vector).float().contiguous() for block, vector in enumerate(found)}
    save_file(vectors, folder / CHANNELS)
    scores = {
        "metric": criterion.name,
        "num_blocks": len(vectors),
        "num_texts": len(rows),
        "intermediate_size": len(vectors["0"]),
        "direction": "higher is more important",
        **{key: value for key, value in spec["metric"].items() if key != "_target_"},
    }
    write_json(folder / "scores.json", scores)
    curves = [vectors[str(block)].tolist() for block in range(len(vectors))]
    channel_curves(curves, criterion.name, len(rows), folder / "scores.png")


def _measured(
    runtime: Runtime,
    spec: dict[str, Any],
    inputs: Mapping[str, Path],
    source: Path,
    criterion: Any,
    rows: list[list[int]],
) -> Any:
    """Importance from passes over the texts; the second stage of SDMPrune has the first one's and a teacher."""

    def opened(folder: Path) -> Any:
        model = checkpoints.load_model(folder, spec["dtype"], runtime.device, runtime.attention)
        checkpoints.check_logits(model)
        return model

    model = opened(source)
    if not isinstance(criterion, SDM):
        return criterion.measure(model, rows, runtime.micro_batch_tokens)
    teacher = opened(runtime.source(spec["model"], "model")) if "pruned" in inputs else None
    return criterion.measure(model, rows, runtime.micro_batch_tokens, read_channels(inputs["first"]), teacher)


def read_channels(folder: Path) -> list[Any]:
    """The importance of every block's channels in a scores artifact."""
    from safetensors.torch import load_file

    found = load_file(folder / CHANNELS)
    return [found[str(block)] for block in range(len(found))]


DEPTH = {"metric": (str, None), "removed_blocks": [int], "kept_blocks": [int], "parameters_before": int}
DEPTH |= {"size": (int, None), "start": (int, None), "score": (float, None)}


def build_narrowed(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """The checkpoint with narrower MLPs, and `pruning.json`.

    `removed_of_all` and `removed_of_mlp` are shares of the model that was narrowed; where blocks went before,
    `parameters_before` and `flops_saved` count from the unpruned model, and what is said of blocks is the depth cut's.
    """
    spec = recipe.spec
    source = inputs["pruned"] if "pruned" in inputs else runtime.source(spec["model"], "model")
    sizes = sizes_of(source)
    width = sizes.width(Share(spec["ratio"], spec["ratio_of"], spec["multiple"]))
    kept = [kept_channels(importance.tolist(), width) for importance in read_channels(inputs["scores"])]
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
    asked = {"ratio": spec["ratio"], "ratio_of": spec["ratio_of"]}
    write_json(folder / "pruning.json", cut | asked | facts)
