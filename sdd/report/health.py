"""Health of generation: what averages of right answers hide. Pure functions of answers and scores.

Choosing among given answers hides what pruning breaks in writing one (arXiv 2606.17609, 2602.01997), and an average
hides that other items are right than before (flips: Dutta et al. 2024, arXiv 2407.09141).

    repeats         an answer that ends in the same words over and over
    words           the length of an answer
    flips           right -> wrong and wrong -> right against the unpruned model, item by item
    calibration     expected calibration error of choices by likelihood (Guo et al. 2017, arXiv 1706.04599, eq. 3)
    symptoms        in what a student writes worse than the unpruned model, by more than chance and more than a trifle

What they do not know: a loop that counts on ("Step 1, Step 2, ..."), and whether a short answer is a worse one.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sdd.report.intervals import Array

Interval = Mapping[str, float]

COPIES = 3
"""How often the same words must stand at the end of an answer."""
LEAST = 60
"""Characters that all copies together must have, so that "no, no, no" is none."""
LONGEST = 400
"""Characters of the longest words that are looked for."""
TAIL = LEAST // COPIES
"""Characters of the end that every copy must hold again."""

SHARE = 0.02
"""By how much of all answers a rate must be above the unpruned model's."""
ITEMS = 5
"""How many items that must come to, so that one odd answer marks nobody."""
FLIPPED = 0.05
"""How many of all items may go from right to wrong while as many go the other way."""
LENGTHS = (2 / 3, 3 / 2)
"""Between which an answer's mean length may lie, of the unpruned model's."""
FINE = 0.9
"""From which share of the unpruned model's average on an average is fine."""

RATES = {
    "repeated": "repeat themselves to the end",
    "cut": "are cut at the token limit",
    "malformed": "end without stating an answer",
}
"""What is counted of answers, and how it is said of them."""


def repeats(text: str) -> bool:
    """Whether a text ends in `COPIES` or more of the same characters, a last copy being perhaps cut.

    Where a text ends inside a copy, its end is still periodic: the last characters of any such length repeat. The
    lengths that come into question are the distances at which its very end stood before.
    """
    text = text.rstrip()
    end = len(text) - TAIL
    tail = text[end:] if len(text) >= LEAST else ""
    at = text.rfind(tail, 0, -1) if tail else -1
    while at >= 0 and (length := end - at) <= LONGEST:
        if text.endswith(text[-length:] * max(COPIES, -(-LEAST // length))):
            return True
        at = text.rfind(tail, 0, at + TAIL - 1)
    return False


def words(text: str) -> int:
    """Words in a text, as spaces part them."""
    return len(text.split())


def flips(student: Array, teacher: Array) -> tuple[Array, Array]:
    """1 where an item went from right to wrong, and where from wrong to right; scores of 0 and 1, (S, N) and (1, N)."""
    return teacher * (1 - student), (1 - teacher) * student


def confidence(log_likelihoods: Sequence[float]) -> float:
    """The share of the likeliest choice among all, in (0, 1]: the largest softmax of log-likelihoods in nats."""
    nats = np.asarray(log_likelihoods, dtype=np.float64)
    return float(1 / np.exp(nats - nats.max()).sum())


def calibration_error(confidences: npt.ArrayLike, right: npt.ArrayLike, bins: int = 10) -> float:
    """Mean over items of |accuracy - confidence| of their bin, in [0, 1]; bins of equal width, (0, 1/bins] the first.

    With few items in a bin it is more than 0 by chance alone.
    """
    sure, hits = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    places = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(places, weights=hits - sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(sure))


def symptoms(
    changes: Mapping[str, Interval | None],
    items: int,
    length: Interval | None,
    flipped: Sequence[Interval],
    scored: int,
) -> list[str]:
    """Names of what is worse than the unpruned model's, each with its whole 95% interval on the worse side.

    `changes` are differences of `RATES` to the unpruned model, `length` is the ratio of words, both over `items`;
    `flipped` are the shares of the `scored` items that went from right to wrong and back. Intervals are {"mean",
    "low", "high"}. Flips count where both ways do: what only gets worse, the average shows.
    """
    least = max(SHARE, ITEMS / max(items, 1))
    named = [name for name in RATES if (change := changes.get(name)) and change["low"] > 0 and change["mean"] >= least]
    if length and items >= ITEMS and not (length["low"] <= LENGTHS[1] and length["high"] >= LENGTHS[0]):
        named.append("longer" if length["mean"] > 1 else "shorter")
    if flipped and all(way["low"] > FLIPPED and way["mean"] * scored >= ITEMS for way in flipped):
        named.append("flips")
    return named
