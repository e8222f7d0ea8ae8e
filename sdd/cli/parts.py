"""What compositions share: commands and jobs differ in few groups, and what the others come to is merged once.

Hydra merges some thirty configs in the order of the defaults list. What stands under one top-level key (a group and its
settings) depends on those configs alone that say something there, so that it is kept by them. The one exception is a
reference (`${dataset}`) that a later config writes over, where Hydra copies what is referred to. Knows nothing of what
the configs mean.
"""

import pickle
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal import defaults_list
from hydra.core.default_element import InputDefault, ResultDefault
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from sdd.config.allowed import interpolations

MOST_PARTS = 2_000
"""Parts that are kept, a few KB each."""
OWN = "hydra"
"""The key under which files may say a few plain values only: no reference of theirs is written over."""

Key = tuple[str | None, Hashable]
"""The package of a config, empty where it stands at the top, and whatever tells it from others."""
Compose = Callable[[list[ResultDefault]], DictConfig]
Path = tuple[Any, ...]


class Parts:
    """Pickled parts of composed configs, by their top-level key and all configs that say something under it."""

    def __init__(self) -> None:
        self.parts: dict[tuple[Hashable, ...], bytes] = {}
        self.said: dict[Key, dict[Path, bool]] = {}
        """Every path that a config says something at, and whether that is a reference."""

    def read(self, key: Key, config: DictConfig) -> None:
        """Note what a config says."""
        self.said[key] = dict(_paths(OmegaConf.to_container(config, resolve=False)))

    def composed(self, defaults: Sequence[ResultDefault], keys: Sequence[Key], compose: Compose) -> DictConfig:
        """The config of a defaults list, whose entries `keys` tell apart; `compose` is Hydra's own way, for some."""
        chains = self._chains(keys)
        missing = {top for top, chain in chains.items() if chain not in self.parts}
        if missing:
            if not all(self._stand_alone(top, chains[top]) for top in missing - {None, OWN}):
                return compose(list(defaults))
            about = [not key[0] or any(path[0] in missing for path in self.said[key]) for key in keys]
            some = [one for at, one in enumerate(defaults) if about[at] or at == 0]  # Hydra's own key comes first
            try:
                composed = compose(some)
            except HydraException:  # which it would raise of all too, or it is due to the others' absence
                composed = compose(list(defaults))
            if not missing <= {None, *composed}:  # Hydra took a key out
                return compose(list(defaults))
            self._keep({top: chains[top] for top in missing}, composed)
        config: DictConfig = pickle.loads(self.parts[chains.pop(None)])
        for top, chain in chains.items():
            node = pickle.loads(self.parts[chain])
            node._set_parent(config)
            config.__dict__["_content"][top] = node
        return config

    def _chains(self, keys: Sequence[Key]) -> dict[Any, tuple[Hashable, ...]]:
        """By top-level key, in the order of their first mention: the key, and who says something; None: at the top."""
        chains: dict[Any, list[Hashable]] = {None: [None, *(key for key in keys if not key[0])]}
        for key in keys:
            for path in self.said[key]:
                if len(path) == 1:
                    chains.setdefault(path[0], [path[0]]).append(key)
        return {top: tuple(chain) for top, chain in chains.items()}

    def _stand_alone(self, top: Any, chain: tuple[Any, ...]) -> bool:
        references: set[Path] = set()
        for key in chain[1:]:
            if not references.isdisjoint(self.said[key]):
                return False
            references |= {path for path, refers in self.said[key].items() if refers and path[0] == top}
        return True

    def _keep(self, chains: dict[Any, tuple[Hashable, ...]], config: DictConfig) -> None:
        if len(self.parts) > MOST_PARTS:
            self.parts.clear()
        content, config.__dict__["_content"] = config.__dict__["_content"], {}
        config._metadata.resolver_cache = defaultdict(dict)  # of what was looked at in merging
        for top, chain in chains.items():
            part = config if top is None else content[top]
            part._set_parent(None)
            self.parts[chain] = pickle.dumps(part, pickle.HIGHEST_PROTOCOL)


PARTS = Parts()
"""Of this process, whose loaders share them."""


def _paths(value: Any, path: Path = ()) -> Iterator[tuple[Path, bool]]:
    if path:
        yield path, isinstance(value, str) and "${" in value and interpolations(value)[0::2] == ((), True)
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _paths(item, (*path, key))


_choices = defaults_list._create_interpolation_map
_NO_CHOICES = OmegaConf.create()


def _where_asked_for(overrides: Any, defaults: list[InputDefault], self_added: bool) -> DictConfig:
    if any(not default.is_self() and default.is_interpolation() for default in defaults):
        known: DictConfig = _choices(overrides, defaults, self_added)
        return known
    return _NO_CHOICES


@contextmanager
def choices_where_asked_for() -> Iterator[None]:
    """Within, Hydra makes a config of all choices so far for those defaults lists only that refer to one (`${model}`).

    It makes one for every file otherwise, which is half of what a defaults list takes.
    """
    defaults_list._create_interpolation_map = _where_asked_for
    try:
        yield
    finally:
        defaults_list._create_interpolation_map = _choices
