"""Seconds and memory of work on a CPU or a GPU, and several ways of doing the same in turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.peak import own_peak

Seconds = dict[str, list[float]]
"""Of every way, turn by turn."""


def seconds(device: str) -> float:
    """On "cpu" those of this process, which others on the machine do not lengthen; on "cuda" the clock's, once all that
    was asked of the GPU is done."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> float:
    """Bytes: of this process so far, or on a GPU those allocated there."""
    import torch

    if device != "cpu":
        return float(torch.cuda.max_memory_allocated())
    return own_peak()


def timed(way: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds, and what it came to."""
    started = seconds(device)
    result = way()
    return seconds(device) - started, result


def in_turns(ways: Mapping[str, Callable[[], tuple[float, Any]]], turns: int) -> tuple[Seconds, dict[str, list[Any]]]:
    """All ways one after the other in every turn, backwards in every other one: what they say of their seconds, and
    what they came to, turn by turn."""
    taken: Seconds = {name: [] for name in ways}
    results: dict[str, list[Any]] = {name: [] for name in ways}
    for turn in range(turns):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            spent, result = ways[name]()
            taken[name].append(spent)
            results[name].append(result)
    return taken, results


def clocked(ways: Mapping[str, Callable[[], Any]], device: str) -> dict[str, Callable[[], tuple[float, Any]]]:
    """The ways as `in_turns` takes them."""
    return {name: partial(timed, way, device) for name, way in ways.items()}


def share(limit: Callable[[], Any], own: Callable[[], Any]) -> float:
    """Seconds of a limit over one's own on a CPU, the median of three turns: at best 1."""
    taken, _ = in_turns(clocked({"limit": limit, "sdd": own}, "cpu"), 3)
    return statistics.median(a / b for a, b in zip(*taken.values(), strict=True))
