"""Config nodes copied and written fast: of a planned job of a sweep, Hydra's four copies and three files were half.

A node's own copy goes through every field of every node's metadata, which are names, types and flags. Knows nothing of
what configs mean.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from functools import lru_cache
from typing import Any

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf._utils import get_omega_conf_dumper
from omegaconf.base import Node

from sdd.models.garbage import look_as_usual, look_rarely

_plain_copy, _plain_yaml = DictConfig.__deepcopy__, OmegaConf.to_yaml


def copied(node: Any, parent: Any = None) -> Any:
    """A node and all below it, under another parent; like OmegaConf's own copy it shares a leaf's value."""
    other = object.__new__(type(node))
    state = other.__dict__
    state.update(node.__dict__)
    known, content = state["_metadata"], state.get("_content")
    metadata = object.__new__(type(known))
    metadata.__dict__.update(known.__dict__)
    metadata.flags = dict(known.flags)
    resolved = known.resolver_cache
    metadata.resolver_cache = copy.deepcopy(resolved) if resolved else defaultdict(dict)
    state["_metadata"], state["_parent"], state["_flags_cache"] = metadata, parent, None
    if isinstance(content, dict):
        state["_content"] = {key: copied(child, other) for key, child in content.items()}
    elif isinstance(content, list):
        state["_content"] = [copied(child, other) for child in content]
    elif isinstance(content, Node):
        state["_content"] = copied(content, other)
    return other


def unresolved(node: Any) -> Any:
    """A node as plain values, references as they are written: `OmegaConf.to_container(node, resolve=False)`."""
    state = node.__dict__
    content = state["_content"] if "_content" in state else state["_val"]
    if isinstance(content, dict):
        return {key: unresolved(child) for key, child in content.items()}
    if isinstance(content, list):
        return [unresolved(child) for child in content]
    return unresolved(content) if isinstance(content, Node) else content


def _copy(self: DictConfig, memo: dict[int, Any]) -> DictConfig:
    """The parent is kept, and not copied."""
    node: DictConfig = copied(self, self.__dict__["_parent"])
    return node


class _Dumper(getattr(yaml, "CDumper", yaml.Dumper)):  # type: ignore[misc]
    """libyaml's writer, where PyYAML was built with it, and OmegaConf's rules for strings and choices."""


class _BeyondASCII(Exception):
    """Such text libyaml writes in another way, where it writes it at all."""


@lru_cache(maxsize=10_000)
def _style(text: str) -> str | None:
    """How a text is quoted, which takes a try to read it as a number."""
    style: str | None = get_omega_conf_dumper().str_representer(yaml.representer.SafeRepresenter(), text).style
    return style


def _text(dumper: Any, text: str) -> yaml.ScalarNode:
    if not text.isascii():
        raise _BeyondASCII
    node: yaml.ScalarNode = dumper.represent_scalar(
        yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG, text, style=_style(text)
    )
    return node


_Dumper.add_representer(str, _text)
_Dumper.add_multi_representer(Enum, lambda dumper, choice: _text(dumper, choice.name))


def _yaml(config: Any, *, resolve: bool = False, sort_keys: bool = False) -> str:
    if not resolve and isinstance(config, Container):
        with suppress(_BeyondASCII):
            how = {"default_flow_style": False, "allow_unicode": True, "sort_keys": sort_keys}
            return str(yaml.dump(unresolved(config), Dumper=_Dumper, **how))
    return _plain_yaml(config, resolve=resolve, sort_keys=sort_keys)


@contextmanager
def quick_nodes() -> Iterator[None]:
    """Within, Hydra's and OmegaConf's own calls copy and write configs this way."""
    look_rarely()
    DictConfig.__deepcopy__ = _copy  # type: ignore[method-assign]
    OmegaConf.to_yaml = staticmethod(_yaml)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        DictConfig.__deepcopy__ = _plain_copy  # type: ignore[method-assign]
        OmegaConf.to_yaml = staticmethod(_plain_yaml)  # type: ignore[method-assign,assignment]
        look_as_usual()
