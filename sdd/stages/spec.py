"""Typed specs: what of a recipe a stage's builder is told, and nothing else."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

from sdd.errors import UserError


@dataclass(frozen=True)
class Spec:
    """The content key of a stage, one field a setting.

    A field with a default is in the key only where it differs from it: what is off adds nothing to an address.
    """

    def key(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {f.name: values[f.name] for f in fields(self) if f.default is MISSING or values[f.name] != f.default}

    @classmethod
    def read(cls, key: Mapping[str, Any]) -> Self:
        """The spec that a manifest records."""
        if missing := [f.name for f in fields(cls) if f.default is MISSING and f.name not in key]:
            raise UserError(f"the recipe says nothing of {missing[0]}; was its manifest edited?")
        return cls(**{field.name: key[field.name] for field in fields(cls) if field.name in key})
