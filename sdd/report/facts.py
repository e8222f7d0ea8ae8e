"""Numbers about single answers and choices, by name, from the samples of one task and one run.

score                       where it is 0 or 1
words, repeated, malformed  of an answer in the model's own words; means where an item was answered several times
cut                         the same, where the limit of tokens and a tokenizer are known
confidence, right           of a choice by likelihood: the softmax of the likeliest, and whether it is the right one
"""

from collections.abc import Callable, Sequence
from typing import Any

from sdd.report.collect import Run
from sdd.report.health import confidence, repeats, words
from sdd.report.limits import cut_at

SHAPE = {"malformed?": (float, bool, None), "log_likelihoods?": [float]}
RIGHT = "acc,none"
"""lm-eval's metric of whether the likeliest choice is right, whatever metric counts."""

Cut = Callable[[Sequence[str]], list[bool]]


def cut_in(runs: list[Run]) -> Cut | None:
    """Which texts fill the limit of an evaluation that the runs share, by the tokenizer that they share too."""
    limit = runs[0].settings.get("evaluation.max_new_tokens")
    folder = next((run.checkpoint for run in runs if run.checkpoint), None)
    return cut_at(limit, folder) if folder and type(limit) is int and limit > 0 else None


def facts_of(rows: list[dict[str, Any]], are_cut: Cut | None) -> list[dict[str, float]]:
    """The numbers of every row."""
    facts, owners, texts = [], [], []
    for row in rows:
        own = {"score": float(row["score"])} if row["score"] in (0, 1) else {}
        if len(row.get("log_likelihoods") or []) > 1:
            own |= _of_choice(row)
        elif answers := _answers(row):
            own |= _of_answers(row, answers)
            owners += [own] * len(answers)
            texts += answers
        facts.append(own)
    if are_cut is not None and texts:
        for own, cut in zip(owners, are_cut(texts), strict=True):
            own["cut"] = own.get("cut", 0.0) + cut / own["answers"]
    return facts


def _answers(row: dict[str, Any]) -> list[str]:
    """What a model wrote, once or several times; nothing where a given answer was only measured."""
    written = [] if "log_likelihood" in row else row.get("response")
    return [text for text in (written if isinstance(written, list) else [written]) if isinstance(text, str)]


def _of_answers(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    count = len(answers)
    facts = {"answers": float(count), "words": sum(map(words, answers)) / count}
    facts["repeated"] = sum(map(repeats, answers)) / count
    return facts | ({} if row.get("malformed") is None else {"malformed": float(row["malformed"])})


def _of_choice(row: dict[str, Any]) -> dict[str, float]:
    metrics = row.get("metrics")
    right = metrics.get(RIGHT, row["score"]) if isinstance(metrics, dict) else row["score"]
    return {"confidence": confidence(row["log_likelihoods"]), "right": float(right)} if right in (0, 1) else {}
