"""The rows that a student is trained on, drawn as `finetune` says; what of its settings is in a key."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
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
    from sdd.finetuning.module import TrainingRow

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
    settings: dict[str, Any],
    seed: int,
    rows: list[dict[str, Any]] | Lines,
    damaged: Path | None,
    domains: Mapping[str, str],
) -> tuple[list[dict[str, Any]] | Lines, list[dict[str, Any]] | Lines]:
    """(rows to train on, held-out rows), the first in the order of which `num_tokens` is yet to take the first.

    The held-out rows are the same whatever is drawn. `damaged` is the artifact of that name, `domains` names the domain
    of every row. Lines of a file that nothing but the seed chooses are not read before they are gone through.
    """
    if isinstance(rows, Lines) and damaged is None and settings.get("deduplicate") is None:
        places = split_rows(range(len(rows)), settings["validation_rows"], settings["num_rows"], seed)
        return rows.at(places[0]), rows.at(places[1])
    rows = list(rows)
    pool, held_out = split_rows(rows, settings["validation_rows"], None, seed)
    if settings.get("deduplicate") is not None:
        pool = _deduplicated(rows, pool, held_out, settings)
    number = settings["num_rows"]
    if damaged is None:
        return pool[:number], held_out
    by_id, ids = {row["id"]: row for row in pool}, [row["id"] for row in pool]
    damages = {
        row["id"]: Damage(row["damage"], row["tokens"])
        for row in read_jsonl(damaged / "rows.jsonl")
        if row["id"] in by_id
    }
    if settings.get("choose") == "damage":
        ids = by_damage(ids, damages, settings["choose_temperature"], seed)
    if settings.get("domains"):
        domains = {id: domains[id] for id in ids}
        shares = shares_by_damage(domains, damages)
        log.info("shares: %s", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
        ids = interleaved(ids, domains, shares, damages)
    ids = ids[:number]
    if settings.get("weights"):
        weights = weights_by_damage(ids, damages)
        by_id = {id: by_id[id] | {"weight": weights[id]} for id in ids}
    return [by_id[id] for id in ids], held_out


def _deduplicated(
    rows: list[dict[str, Any]], pool: list[dict[str, Any]], held_out: list[dict[str, Any]], settings: dict[str, Any]
) -> list[dict[str, Any]]:
    """The pool without rows that say what a held-out or an earlier one says; the same for every seed and every arm.

    What is compared are prompt and reference, which arms share.
    """
    threshold, kept_out = settings["deduplicate"], {row["id"] for row in held_out}
    ordered = held_out + [row for row in rows if row["id"] not in kept_out]
    texts = [f"{task_of(row)}\n{row['reference']}" for row in ordered]
    kept = {ordered[at]["id"] for at in distinct(texts, threshold)}
    left = [row for row in pool if row["id"] in kept]
    log.info("finetune.deduplicate: %d of %d rows are like another and left out", len(pool) - len(left), len(pool))
    if (settings["num_rows"] or 1) > len(left):
        raise UserError(
            f"finetune.num_rows={settings['num_rows']}, but finetune.deduplicate={threshold:g} leaves {len(left)} "
            "rows; lower num_rows, or raise dataset.num_rows"
        )
    return left


def balanced(rows: list[TrainingRow]) -> list[TrainingRow]:
    """The rows with weights that are 1 on average over their target tokens; all 1 where none has any."""
    tokens = [len(row.ids) - row.prompt_length for row in rows]
    total = math.fsum(row.weight * count for row, count in zip(rows, tokens, strict=True))
    return [replace(row, weight=row.weight * sum(tokens) / total if total else 1.0) for row in rows]


def domains_of(runtime: Runtime, targets: Recipe) -> dict[str, str]:
    """The domain of every row of the dataset that targets were made from: its family, its category or its part."""
    spec = targets.inputs["rewrites"].spec if "rewrites" in targets.inputs else targets.spec
    examples = read_examples(runtime, spec["dataset"])
    check_domains({"domains": "damage"}, examples)
    return {example.id: example.group or "" for example in examples}
