"""What compositions share: the jobs of a sweep begin with the same configs, which are merged once.

Hydra merges some thirty configs in the order of the defaults list, each into all before it. Where two lists begin
alike, so do the configs. Knows nothing of what the configs mean.
"""

import pickle
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from hydra._internal import defaults_list
from hydra.core.default_element import InputDefault, ResultDefault
from omegaconf import DictConfig, OmegaConf

MOST_BEGINNINGS = 8
"""A sweep over n groups has n + 1 of them."""


@dataclass
class Begun(ResultDefault):
    """In a defaults list, what its first entries have been merged to."""

    config: DictConfig | None = None


class Merged:
    """The beginnings of defaults lists that more than one composition had, merged and pickled; last what was used last.

    `keys` tell apart what is merged: equal ones stand for equal configs at the same place.
    """

    def __init__(self) -> None:
        self.beginnings: dict[tuple[Hashable, ...], bytes] = {}
        self.before: list[Hashable] = []

    def begin(self, keys: list[Hashable], merge: Callable[[DictConfig, int, int], None]) -> tuple[int, DictConfig]:
        """How many of the configs that `keys` stand for are merged already, and into what.

        `merge(config, start, end)` merges those from `start` to before `end` into a config.
        """
        alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(keys, self.before, strict=False)))
        known = max((len(first) for first in self.beginnings if first == tuple(keys[: len(first)])), default=0)
        self.before, config = keys, OmegaConf.create()
        if known:
            first = tuple(keys[:known])
            self.beginnings[first] = self.beginnings.pop(first)
            config = pickle.loads(self.beginnings[first])
        if alike > known:
            merge(config, known, alike)
            self.beginnings[tuple(keys[:alike])] = pickle.dumps(config, pickle.HIGHEST_PROTOCOL)
            if len(self.beginnings) > MOST_BEGINNINGS:
                del self.beginnings[next(iter(self.beginnings))]
        return max(alike, known), config


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
