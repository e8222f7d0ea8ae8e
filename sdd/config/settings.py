"""The schema as a table: what each setting of the config is, by its dotted key."""

import types
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Union, get_args, get_origin

from sdd.config.schema import Config, hints_of

NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Setting:
    """The type of a setting, and whether it may be null, or the word auto."""

    type: Any
    optional: bool
    auto: bool = False

    @property
    def is_group(self) -> bool:
        """Whether it holds settings of its own."""
        return is_dataclass(self.type)

    @property
    def expected(self) -> str:
        """What a value must be, in words: "a whole number, or null"."""
        origin, words = get_origin(self.type), NAMES.get(self.type, "settings by name, {key: value}")
        if origin is list:
            items = NAMES.get(get_args(self.type)[0], "values").removeprefix("a ").removesuffix(" number")
            words = {"whole": "a list of whole numbers", "number": "a list of numbers", "text": "a list of words"}.get(
                items, "a list"
            )
        return words + (", or null" if self.optional else "") + (", or auto" if self.auto else "")


def setting(key: str) -> Setting | None:
    """The setting at a dotted key; None for what the schema leaves open, or does not have."""
    current = Setting(Config, False)
    for part in key.split("."):
        if current.is_group:
            hint = hints_of(current.type).get(part)
        elif get_origin(current.type) is dict:
            hint = get_args(current.type)[1]
        else:
            return None
        if hint is None or hint is Any:
            return None
        current = _of(hint)
    return current


def descriptions(kind: Any = Config, before: str = "") -> dict[str, str]:
    """What each setting and group of the schema says that it is, by dotted key."""
    hints, texts = hints_of(kind), {}
    for field in fields(kind):
        key, own = f"{before}{field.name}", _of(hints[field.name])
        texts[key] = str(field.metadata.get("description", ""))
        if own.is_group:
            texts |= descriptions(own.type, f"{key}.")
    return texts


def _of(hint: Any) -> Setting:
    if get_origin(hint) in (Union, types.UnionType):
        kinds = get_args(hint)
        inner, *word = (kind for kind in kinds if kind is not type(None))
        return Setting(inner, type(None) in kinds, word == [str])
    return Setting(hint, False)


def keys(kind: Any = Config, before: str = "") -> Iterator[str]:
    """Every dotted key of the schema, groups of settings included."""
    hints = hints_of(kind)
    for field in fields(kind):
        key, own = f"{before}{field.name}", _of(hints[field.name])
        yield key
        if own.is_group:
            yield from keys(own.type, f"{key}.")
