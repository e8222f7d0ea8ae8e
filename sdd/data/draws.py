"""Which rows a student is trained on: an order of all that are not held out, of which it takes the first.

    damage     (log p_unpruned - log p_pruned) of a row's target, in nats per target token: what the cut took away.
               Where it is large, the unpruned model knows what the pruned one does not (the difference by which
               MiniPLM, arXiv 2410.17215, chooses texts; PASER, arXiv 2502.12594, chooses data for pruned models)

An order is a function of the seed, and a smaller draw is a prefix of a larger one. Knows nothing of models, nor of how
long a row is in training.
"""

import math
import random
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import pstdev
from typing import Any


def split_rows(
    rows: Sequence[Any], validation_rows: int, num_rows: int | None, seed: int
) -> tuple[list[Any], list[Any]]:
    """(training, validation) rows. Validation is the same for every seed; training sets of one seed are nested."""
    held_out = list(range(len(rows)))
    random.Random("validation").shuffle(held_out)
    validation, rest = held_out[:validation_rows], sorted(held_out[validation_rows:])
    random.Random(f"rows {seed}").shuffle(rest)
    return [rows[i] for i in rest[:num_rows]], [rows[i] for i in validation]


@dataclass(frozen=True)
class Damage:
    """What the cut took from a row's target, in nats per token, and how many tokens that target has."""

    per_token: float
    tokens: int


def mean(damages: Iterable[Damage]) -> float:
    """Nats per token over all tokens; 0 where there are none."""
    sums, tokens = array("d"), 0
    for one in damages:
        sums.append(one.per_token * one.tokens)
        tokens += one.tokens
    return math.fsum(sums) / max(1, tokens)


def by_damage(ids: Sequence[str], damages: Mapping[str, Damage], temperature: float, seed: int) -> list[str]:
    """The rows with the largest damage per token first; those of which it is not known last, in the order they had.

    At a temperature above 0 each next row is drawn with a probability in proportion to exp(damage / temperature), the
    damage in its standard deviations over all rows (Gumbel top-k, arXiv 1903.06059): seeds draw different rows, and a
    seed's noise at a row is the same whoever wrote its target. At 0 nothing is drawn, and ties stay as they were.
    """
    known = [id for id in ids if id in damages]
    spread = pstdev(damages[id].per_token for id in known) if known else 0.0

    def key(id: str) -> float:
        damage = damages[id].per_token / (spread or 1.0)
        if not temperature:
            return damage
        return damage / temperature - math.log(max(random.Random(f"damage {seed} {id}").expovariate(1.0), 1e-300))

    return sorted(known, key=key, reverse=True) + [id for id in ids if id not in damages]


def shares_by_damage(domains: Mapping[str, str], damages: Mapping[str, Damage]) -> dict[str, float]:
    """The share of each domain in what is trained on; `domains` names that of every row. They sum to 1.

    In proportion to exp(damage per token), the ratio of the pruned model's perplexity to the unpruned model's: after
    DDK (arXiv 2407.16154), whose weights follow both models' losses in a domain, but taken once, before training.
    """
    by_domain: dict[str, list[Damage]] = defaultdict(list)
    for id, domain in domains.items():
        if id in damages:
            by_domain[domain].append(damages[id])
    means = {domain: mean(by_domain[domain]) for domain in sorted(by_domain)}
    highest = max(means.values(), default=0.0)
    ratios = {domain: math.exp(value - highest) for domain, value in means.items()}
    return {domain: ratio / math.fsum(ratios.values()) for domain, ratio in ratios.items()}


def interleaved(
    ids: Sequence[str], domains: Mapping[str, str], shares: Mapping[str, float], damages: Mapping[str, Damage]
) -> list[str]:
    """The rows so that every domain has its share of the target tokens so far; within one, their order stays.

    A domain that has run out leaves its share to the others, in proportion to theirs; rows of unknown length are last.
    """
    passed: dict[str, int] = defaultdict(int)
    due: dict[str, float] = {}
    for id in ids:
        if id in damages:
            passed[domains[id]] += damages[id].tokens
            share = shares[domains[id]]
            due[id] = passed[domains[id]] / share if share else math.inf
    return sorted(due, key=due.__getitem__) + [id for id in ids if id not in due]


def weights_by_damage(ids: Iterable[str], damages: Mapping[str, Damage]) -> dict[str, float]:
    """What a row's loss counts beside the others': its damage per token, and 0 where the cut did it no harm.

    A row of which that is not known counts as much as a token does on average.
    """
    known = {id: max(0.0, one.per_token) for id, one in damages.items()}
    usual = mean(Damage(known[id], one.tokens) for id, one in damages.items())
    return {id: known.get(id, usual) for id in ids}
