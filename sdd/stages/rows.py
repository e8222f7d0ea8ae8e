"""Stages `rewrites` and `targets`: from a dataset to the answers that a student is trained on."""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.allowed import build
from sdd.data import Example
from sdd.distill import Selection, choose_target, rewrite_rows
from sdd.errors import UserError
from sdd.prompts import rewrite_prompt
from sdd.stages.runtime import Runtime, read_jsonl, write_json, write_jsonl
from sdd.store import SCRATCH, Recipe

log = logging.getLogger(__name__)

CHUNK_ROWS = 128
"""Rows of one chunk: what a killed run loses at most."""

ENGINES = {"hf": "sdd.engines.HFEngine"}


def read_examples(runtime: Runtime, spec: dict[str, Any]) -> list[Example]:
    """The dataset rows that a recipe names, checked against its digest."""
    node: dict[str, Any] = {key: spec[key] for key in ("_target_", "num_rows", "families") if key in spec}
    if spec.get("seed") is not None:
        node["seed"] = spec["seed"]
    if "families" not in spec:
        node["path"] = str(runtime.source(spec["digest"], "dataset"))
    source = build(node)
    if source.spec()["digest"] != spec["digest"]:
        raise UserError(f"the dataset differs from the one with digest {spec['digest']}")
    examples: list[Example] = source.examples()
    return examples


def build_rewrites(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`rewrites.jsonl`; finished chunks of rows of similar length survive a kill."""
    spec = recipe.spec
    examples = read_examples(runtime, spec["dataset"])
    settings = {key: value for key, value in spec["engine"].items() if key != "kind"}
    engine = build({"_target_": ENGINES[spec["engine"]["kind"]], **settings})
    selection = _selection(spec["selection"]) if "selection" in spec else Selection()
    order = sorted(
        range(len(examples)),
        key=lambda i: (-len(rewrite_prompt(spec["template"], examples[i].prompt, examples[i].reference)), i),
    )
    chunks = [order[at : at + CHUNK_ROWS] for at in range(0, len(order), CHUNK_ROWS)]
    scratch = folder / SCRATCH
    scratch.mkdir(exist_ok=True)
    opened = False
    with tqdm(total=len(examples), desc="rewrites", unit="row") as progress:
        for number, chunk in enumerate(chunks):
            path = scratch / f"{number:06d}.jsonl"
            if not path.is_file():
                if not opened:
                    teacher = runtime.source(spec["teacher"], "teacher")
                    batch_size = runtime.inference_batch_size
                    engine.open(teacher, spec["dtype"], spec["system_prompt"], runtime.device, batch_size)
                    opened = True
                write_jsonl(path, rewrite_rows(engine, [examples[i] for i in chunk], spec["template"], selection))
            else:
                progress.initial += len(chunk)
            progress.update(len(chunk))
    rows = {row["id"]: row for number in range(len(chunks)) for row in read_jsonl(scratch / f"{number:06d}.jsonl")}
    write_jsonl(folder / "rewrites.jsonl", (rows[example.id] for example in examples))


def _selection(spec: dict[str, Any]) -> Selection:
    return Selection(spec["rule"], tuple(spec["leak_phrases"]))


def build_targets(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`train.jsonl` with a reason for every row, and `summary.json` with the count of each."""
    spec = recipe.spec
    if spec["mode"] == "self_distill":
        selection = _selection(spec) if spec["select"] else None
        rows = [
            choose_target(row, selection, spec["gold_share"])
            for row in read_jsonl(inputs["rewrites"] / "rewrites.jsonl")
        ]
        dataset = recipe.inputs["rewrites"].spec["dataset"]
    else:
        dataset = spec["dataset"]
        gold = spec["mode"] == "gold"
        rows = [
            {
                "id": e.id,
                "prompt": e.prompt,
                "reference": e.reference,
                "target": e.gold if gold else e.reference,
                "source": "gold" if gold else "reference",
                "reason": spec["mode"],
            }
            for e in read_examples(runtime, dataset)
        ]
    write_jsonl(folder / "train.jsonl", rows)
    reasons = Counter(row["reason"] for row in rows)
    groups = Counter(e.group for e in read_examples(runtime, dataset) if e.group is not None)
    write_json(folder / "summary.json", {"rows": len(rows), "reasons": dict(reasons), "groups": dict(groups)})
    if spec["mode"] == "self_distill":
        log.info("targets: %s", ", ".join(f"{reason} {count}" for reason, count in reasons.most_common()))
