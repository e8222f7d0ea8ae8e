"""The rows that a student is trained on, drawn as `finetune` says; what of its settings is in a key."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd.config.schema import Finetune
from sdd.data import Example
from sdd.data.draws import (
    Damage,
    by_damage,
    interleaved,
    shares_by_damage,
    split_rows,
    weights_by_damage,
)
from sdd.data.duplicates import distinct
from sdd.errors import UserError
from sdd.rewriting.selection import task_of
from sdd.stages.datasets import read_examples
from sdd.stages.runtime import Runtime
from sdd.store import Recipe
from sdd.store.files import Lines, read_jsonl

if TYPE_CHECKING:
    from sdd.finetuning.rows import KeptRows

log = logging.getLogger(__name__)

BY_DAMAGE = ("choose", "weights", "domains")
"""Settings that may be `damage`."""
OFF = {key: getattr(Finetune, key) for key in (*BY_DAMAGE, "choose_temperature", "deduplicate", "num_tokens")}
"""What a draw has by default, which adds nothing to a key."""


def key_of(finetune: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those of a draw that are off."""
    off = {key for key, value in OFF.items() if finetune[key] == value and key != "choose_temperature"}
    if "choose" in off:
        off.add("choose_temperature")
    return {key: value for key, value in finetune.items() if key not in off}


def needs_damage(finetune: Mapping[str, Any]) -> str | None:
    """The first setting that asks for what the cut took from every row; None where none does."""
    return next((key for key in BY_DAMAGE if finetune.get(key) == "damage"), None)


def check_domains(finetune: Mapping[str, Any], examples: list[Example]) -> None:
    """Refuse domains where there are none to weigh."""
    if finetune.get("domains") and len({example.group for example in examples}) < 2:
        raise UserError(
            "finetune.domains=damage: the rows are of one domain; choose several families, a dataset with groups, or "
            "dataset=mixture, or leave it out"
        )


def drawn(
    settings: Mapping[str, Any],
    seed: int,
    rows: Lines,
    damaged: Path | None,
    domains: Mapping[str, str],
) -> tuple[Lines, Lines]:
    """(rows to train on, held-out rows), the first in the order of which `num_tokens` is yet to take the first.

    The held-out rows are the same whatever is drawn. `damaged` is the artifact of that name, `domains` names the domain
    of every row. Where nothing but the seed chooses, no row is read before they are gone through.
    """
    pool, held_out = split_rows(range(len(rows)), settings["validation_rows"], None, seed)
    if settings.get("deduplicate") is not None:
        pool = _deduplicated(rows, pool, held_out, settings)
    number = settings["num_rows"]
    if damaged is None:
        return rows.at(pool[:number]), rows.at(held_out)
    places = {row["id"]: place for row, place in zip(rows.at(pool), pool, strict=True)}
    ids, damages = (
        list(places),
        {
            row["id"]: Damage(row["damage"], row["tokens"])
            for row in read_jsonl(damaged / "rows.jsonl")
            if row["id"] in places
        },
    )
    if settings.get("choose") == "damage":
        ids = by_damage(ids, damages, settings["choose_temperature"], seed)
    if settings.get("domains"):
        domains = {id: domains[id] for id in ids}
        shares = shares_by_damage(domains, damages)
        log.info("shares: %s", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
        ids = interleaved(ids, domains, shares, damages)
    ids = ids[:number]
    chosen = rows.at(places[id] for id in ids)
    if settings.get("weights"):
        chosen = chosen.having("weight", {places[id]: w for id, w in weights_by_damage(ids, damages).items()})
    return chosen, rows.at(held_out)


class Said:
    """What rows say, prompt and reference, read as it is asked for."""

    def __init__(self, rows: Lines) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return (f"{task_of(row)}\n{row['reference']}" for row in self.rows)

    def __getitem__(self, at: int) -> str:
        return next(iter(Said(self.rows.at([at]))))


def _deduplicated(rows: Lines, pool: list[int], held_out: list[int], settings: Mapping[str, Any]) -> list[int]:
    """The pool without rows that say what a held-out or an earlier one says; the same for every seed and every arm.

    Rows are named by their places. What is compared are prompt and reference, which arms share.
    """
    threshold, kept_out = settings["deduplicate"], set(held_out)
    ordered = held_out + [place for place in range(len(rows)) if place not in kept_out]
    kept = {ordered[at] for at in distinct(Said(rows.at(ordered)), threshold)}
    left = [place for place in pool if place in kept]
    log.info("finetune.deduplicate: %d of %d rows are like another and left out", len(pool) - len(left), len(pool))
    if (settings["num_rows"] or 1) > len(left):
        raise UserError(
            f"finetune.num_rows={settings['num_rows']}, but finetune.deduplicate={threshold:g} leaves {len(left)} "
            "rows; lower num_rows, or raise dataset.num_rows"
        )
    return left


def balance(rows: KeptRows) -> None:
    """Make the rows' weights 1 on average over their target tokens; all 1 where none has any."""
    total = math.fsum(weight * count for weight, count in zip(rows.weights, rows.targets, strict=True))
    tokens = sum(rows.targets)
    rows.weights = array("d", (weight * tokens / total if total else 1.0 for weight in rows.weights))


def domains_of(runtime: Runtime, targets: Recipe) -> dict[str, str]:
    """The domain of every row of the dataset that targets were made from: its family, its category or its part."""
    spec = targets.inputs["rewrites"].spec if "rewrites" in targets.inputs else targets.spec
    examples = read_examples(runtime, spec["dataset"])
    check_domains({"domains": "damage"}, examples)
    return {example.id: example.group or "" for example in examples}
