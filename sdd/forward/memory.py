"""Passes that memory does not last for, begun again on halves of their rows; what did not fit is not tried again.

Each row's own result is as in any other batch; sums over rows are added in another order, and rounded otherwise.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

log = logging.getLogger(__name__)

SHORT = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""How it shows where it has no class of its own."""

T = TypeVar("T")
R = TypeVar("R")


def is_short(error: BaseException) -> bool:
    """Whether memory did not last; torch's own class is known by its name, so that nobody imports torch to ask."""
    kinds = ("MemoryError", "OutOfMemoryError")
    return type(error).__name__ in kinds or any(words in str(error) for words in SHORT)


def freed(what: str, at_once: int, then: int) -> None:
    """Say in a line how much goes together from now on, and give back what the failed pass has left."""
    import torch

    log.warning("out of memory: %d %s at once did not fit; going on with %d", at_once, what, then)
    if torch.cuda.is_initialized():
        gc.collect()  # frames of the failed pass may hold each other
        torch.cuda.empty_cache()


class Halving:
    """Work on rows, in halves where memory does not last. `size` is how much some rows are, such as padded tokens;
    what is as large as what did not fit is halved before it is tried."""

    def __init__(self, what: str, size: Callable[[Sequence[Any]], int] = len) -> None:
        self.what, self.size = what, size
        self.too_much: int | None = None

    def __call__(self, work: Callable[[Sequence[T]], R], rows: Sequence[T]) -> Iterator[tuple[Sequence[T], R]]:
        """The rows, or parts of them in their order, each with what `work` gives for it; a single row has to fit."""
        waiting = [rows]
        while waiting:
            some = waiting.pop()
            size, half = self.size(some), (len(some) + 1) // 2
            fits, result = self.too_much is None or size < self.too_much or len(some) == 1, []
            try:
                if fits:
                    result.append(work(some))
            except (RuntimeError, MemoryError) as error:
                if len(some) == 1 or not is_short(error):
                    raise
            if result:
                yield some, result.pop()  # nothing of it is left here while the next is made
                continue
            if fits:
                self.too_much = size
                freed(self.what, len(some), half)
            waiting += [some[half:], some[:half]]
