"""The rows that a config names: where they come from, what recipes say of them, what of a dataset's settings counts."""

from collections.abc import Collection
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sdd.config import plain
from sdd.config.allowed import build
from sdd.data import Example

EMBEDDED = "sdd.data.tiny.TinyTasks"
"""The id of the embedded tasks."""


def hub_of(node: DictConfig) -> dict[str, Any] | None:
    """A config's `hub` node as plain values; None where it names no repository."""
    return plain(node) if node.repository else None


OF_RECIPES = ("name", "answer_rule", "template", "leak_phrases", "weight", "system_prompt", "parts")
"""Settings of a dataset's node that no constructor of rows is told."""


def part_node(node: DictConfig, beside: Collection[str]) -> dict[str, Any]:
    """A config's node as its part is built from it: every setting that is given, but those `beside` the part.

    A constructor refuses what it does not know, so that no setting is lost unsaid.
    """
    values = plain(node) | {"hub": hub_of(node.hub)}
    return {key: value for key, value in values.items() if key not in beside and value is not None}


def source_of(dataset: DictConfig) -> Any:
    """The source of rows that a node describes."""
    if not dataset.parts:
        return _rows(dataset, dataset.seed, dataset.num_rows)
    return build(
        part_node(dataset, (*OF_RECIPES, "seed")),  # by the seed each part draws its own
        parts={name: partial(_rows, part, dataset.seed) for name, part in dataset.parts.items()},
        weights={name: part.weight for name, part in dataset.parts.items()},
    )


def _rows(rows: DictConfig, seed: int, num_rows: int | None) -> Any:
    return build(part_node(rows, OF_RECIPES), seed=seed, num_rows=num_rows)


class Rows:
    """The rows of the fine-tuning dataset, or of another node of its kind."""

    def __init__(self, node: DictConfig, sources: dict[str, Path]) -> None:
        self.node, self.sources = node, sources

    @cached_property
    def source(self) -> Any:
        return source_of(self.node)

    @cached_property
    def spec(self) -> dict[str, Any]:
        spec = {"_target_": self.node._target_, **self.source.spec()}
        self.sources |= self.source.sources()
        return spec

    @property
    def parts(self) -> list[DictConfig]:
        """The nodes of a mixture's parts, or the one node."""
        return list(self.node.parts.values()) or [self.node]

    @property
    def examples(self) -> list[Example] | None:
        """The rows; None where they would have to be asked of the hub."""
        if any(part.path is None and part.hub.repository is not None for part in self.parts):
            return None
        examples: list[Example] = self.source.examples()
        return examples

    @property
    def labels(self) -> dict[str, str]:
        return {"dataset": self.node.name}

    def setting(self, key: str) -> Any:
        """A setting of the dataset; in a mixture, of each part by name."""
        dataset = plain(self.node)
        return {name: part[key] for name, part in dataset["parts"].items()} if dataset["parts"] else dataset[key]

    @property
    def selection(self) -> dict[str, Any]:
        """How rewrites are judged."""
        return {"rule": self.setting("answer_rule"), "leak_phrases": self.setting("leak_phrases")}

    @property
    def judged_anew(self) -> bool:
        """Whether final answers are compared that were once read otherwise: "6 or 7", "9 squared", "3/5".

        Those of the embedded tasks are bare numbers and words, which are read as ever.
        """
        return any(part.answer_rule != "none" and part._target_ != EMBEDDED for part in self.parts)
