"""A recipe says what an artifact is: stage, stage version, every setting that changes the content, and its inputs.

Its address is a hash of exactly that, so equal work has equal addresses, whatever machine, batch size or option name
led to it. Knows nothing of how anything is built.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

ADDRESS_LENGTH = 16
"""Hexadecimal digits: 64 bits, ample for the artifacts of one folder."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no white space: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(value: Any) -> str:
    """sha256 of the canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """`spec` and `inputs` are the key; `labels` are descriptive names that are not."""

    stage: str
    version: int
    spec: dict[str, Any]
    inputs: dict[str, "Recipe"] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict, compare=False)
    address: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        inputs = {name: recipe.address for name, recipe in self.inputs.items()}
        object.__setattr__(self, "address", address_of(self.stage, self.version, self.spec, inputs))

    def walk(self) -> Iterator["Recipe"]:
        """This recipe and all upstream of it, inputs first, each address once."""
        seen: set[str] = set()

        def visit(recipe: Recipe) -> Iterator[Recipe]:
            for upstream in recipe.inputs.values():
                yield from visit(upstream)
            if recipe.address not in seen:
                seen.add(recipe.address)
                yield recipe

        return visit(self)


def address_of(stage: str, version: int, spec: dict[str, Any], inputs: dict[str, str]) -> str:
    """The address of a recipe given by its parts; `inputs` maps names to addresses."""
    key = {"stage": stage, "version": version, "spec": spec, "inputs": inputs}
    return digest_of(key)[:ADDRESS_LENGTH]
