"""Which GPUs a stage fits in, and with which settings it would fit in smaller ones.

A GPU of N GB counts as N * 1e9 bytes: what a GiB has more is left to the CUDA context and to fragments. Settings are
searched by the same estimate, those first that change no result; of those that fit, the fastest are taken.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from sdd.planning.estimates import Estimate

GPUS = (24, 48, 80)
"""GB of memory."""

Settings = dict[str, Any]
Fits = dict[int, Settings | None]
"""GPU -> the settings with which it is enough: none where it is as it is, None where no setting helps."""


def fits(
    needed: Estimate, at: Callable[[Settings], Estimate], less: Mapping[str, Any], last: Mapping[str, Any]
) -> Fits:
    """Of work that takes `needed`, and `at` other settings what that says.

    `less` holds the settings that take memory from it and leave its result, `last` those that change it, with today's
    values: numbers are halved, what is off is switched on.
    """
    found: Fits = {gpu: {} if needed.memory <= gpu * 1e9 else None for gpu in GPUS}
    for group in (less, {**less, **last}) if last else (less,):
        if missing := [gpu for gpu, settings in found.items() if settings is None]:
            tried = [(settings, at(settings)) for settings in _changed(group)]
            found |= {gpu: _fastest(tried, gpu) for gpu in missing}
    return found


def _fastest(tried: Sequence[tuple[Settings, Estimate]], gpu: int) -> Settings | None:
    enough = [(one.seconds, len(settings), settings) for settings, one in tried if one.memory <= gpu * 1e9]
    return min(enough, key=lambda entry: entry[:2])[2] if enough else None


def _changed(settings: Mapping[str, Any]) -> list[Settings]:
    """All combinations of smaller values, what stays as it is left out."""
    values = [[value, *_smaller(value)] for value in settings.values()]
    rows = (dict(zip(settings, row, strict=True)) for row in product(*values))
    return [{key: value for key, value in row.items() if value != settings[key]} for row in rows]


def _smaller(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [] if value else [True]
    return [value >> power for power in range(1, int(value).bit_length())]
