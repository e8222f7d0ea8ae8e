"""The rows that a recipe names, read again from where they lie on this machine."""

from functools import partial
from pathlib import Path
from typing import Any

from sdd.config.allowed import build
from sdd.data import Example
from sdd.data.mixture import part_of
from sdd.errors import UserError
from sdd.rewriting.selection import Selection
from sdd.stages.runtime import Runtime
from sdd.store.files import read_jsonl

NO_SETTINGS = ("digest", "weight", "path")
"""What a recipe may say of rows beside their constructor's settings; a path is this machine's, and never a recipe's."""


def is_chunk(path: Path, ids: list[str]) -> bool:
    """Whether a file holds these rows, finished; after a change of the batch size it holds others."""
    return path.is_file() and [row["id"] for row in read_jsonl(path)] == ids


def read_examples(runtime: Runtime, spec: dict[str, Any]) -> list[Example]:
    """The dataset rows that a recipe names, checked against its digest."""
    if "parts" in spec:
        node = {key: value for key, value in spec.items() if key not in (*NO_SETTINGS, "parts")}
        parts = {name: partial(_source, runtime, part) for name, part in spec["parts"].items()}
        source = build(node, parts=parts, weights={name: part["weight"] for name, part in spec["parts"].items()})
    else:
        source = _source(runtime, spec, spec["num_rows"])
    if source.spec()["digest"] != spec["digest"]:
        raise UserError(f"the dataset differs from the one with digest {spec['digest']}")
    examples: list[Example] = source.examples()
    return examples


def _source(runtime: Runtime, spec: dict[str, Any], num_rows: int | None) -> Any:
    node = {key: value for key, value in spec.items() if key not in NO_SETTINGS and value is not None}
    if "families" not in spec and "hub" not in spec:
        node["path"] = str(runtime.source(spec["digest"], "dataset"))
    return build(node, num_rows=num_rows)


def for_row(setting: Any, id: str) -> Any:
    """A dataset's setting as it is for one row: in a mixture, each part has its own."""
    return setting[part_of(id)] if isinstance(setting, dict) else setting


def selection_for(rule: Any, leak_phrases: Any, id: str) -> Selection:
    """How a rewrite of one row is judged."""
    return Selection(for_row(rule, id), tuple(for_row(leak_phrases, id)))
