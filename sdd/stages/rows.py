"""Stages `rewrites` and `targets`: from a dataset to the answers that a student is trained on."""

import logging
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.config.allowed import build
from sdd.data import Example
from sdd.data.mixture import part_of
from sdd.errors import UserError
from sdd.models.chats import rewrite_prompt
from sdd.rewriting.selection import Selection, choose_target, rewrite_rows, with_noise
from sdd.stages.runtime import Runtime, read_jsonl, write_json, write_jsonl
from sdd.store import SCRATCH, Recipe

log = logging.getLogger(__name__)

CHUNK_ROWS = 128
"""Rows of one chunk: what a killed run loses at most."""

ENGINES = {"hf": "sdd.engines.HFEngine"}


def read_examples(runtime: Runtime, spec: dict[str, Any]) -> list[Example]:
    """The dataset rows that a recipe names, checked against its digest."""
    if "parts" in spec:
        node = {"_target_": spec["_target_"], "num_rows": spec["num_rows"]}
        parts = {name: partial(_source, runtime, part) for name, part in spec["parts"].items()}
        source = build(node, parts=parts, weights={name: part["weight"] for name, part in spec["parts"].items()})
    else:
        source = _source(runtime, spec, spec["num_rows"])
    if source.spec()["digest"] != spec["digest"]:
        raise UserError(f"the dataset differs from the one with digest {spec['digest']}")
    examples: list[Example] = source.examples()
    return examples


def _source(runtime: Runtime, spec: dict[str, Any], num_rows: int | None) -> Any:
    node: dict[str, Any] = {key: spec[key] for key in ("_target_", "families", "fields", "hub") if key in spec}
    if spec.get("seed") is not None:
        node["seed"] = spec["seed"]
    if "families" not in spec and "hub" not in spec:
        node["path"] = str(runtime.source(spec["digest"], "dataset"))
    return build(node, num_rows=num_rows)


def build_rewrites(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`rewrites.jsonl`; finished chunks of rows of similar length survive a kill."""
    spec = recipe.spec
    examples = read_examples(runtime, spec["dataset"])
    settings = {key: value for key, value in spec["engine"].items() if key != "kind"}
    engine = build({"_target_": ENGINES[spec["engine"]["kind"]], **settings})
    templates = [_for_row(spec["template"], example.id) for example in examples]
    order = sorted(
        range(len(examples)),
        key=lambda i: (-len(rewrite_prompt(templates[i], examples[i].prompt, examples[i].reference)), i),
    )
    chunks = []
    for part in spec["dataset"].get("parts", [None]):  # rows of one chunk share a template and a selection
        own = [i for i in order if part is None or part_of(examples[i].id) == part]
        chunks += [own[at : at + CHUNK_ROWS] for at in range(0, len(own), CHUNK_ROWS)]
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
                chosen = [examples[i] for i in chunk]
                selection = _selection(spec["selection"], chosen[0].id) if "selection" in spec else Selection()
                write_jsonl(path, rewrite_rows(engine, chosen, templates[chunk[0]], selection))
            else:
                progress.initial += len(chunk)
            progress.update(len(chunk))
    rows = {row["id"]: row for number in range(len(chunks)) for row in read_jsonl(scratch / f"{number:06d}.jsonl")}
    write_jsonl(folder / "rewrites.jsonl", (rows[example.id] for example in examples))


def _for_row(setting: Any, id: str) -> Any:
    """A dataset's setting as it is for one row: in a mixture, each part has its own."""
    return setting[part_of(id)] if isinstance(setting, dict) else setting


def _selection(spec: dict[str, Any], id: str) -> Selection:
    return Selection(_for_row(spec["rule"], id), tuple(_for_row(spec["leak_phrases"], id)))


def build_targets(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`train.jsonl` with a reason for every row, and `summary.json` with the count of each."""
    spec = recipe.spec
    if spec["mode"] == "self_distill":
        rows = [
            choose_target(row, _selection(spec, row["id"]) if spec["select"] else None, spec["gold_share"])
            for row in read_jsonl(inputs["rewrites"] / "rewrites.jsonl")
        ]
        if "noise_share" in spec:
            rows = with_noise(rows, spec["noise_share"], lambda row: _selection(spec, row["id"]))
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
