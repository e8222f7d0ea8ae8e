"""Self-data distillation: let the teacher rewrite reference answers, keep the rewrites that pass, else the reference.

Source: arXiv 2410.09982, after SDFT (arXiv 2402.13669). A rewrite is refused when it is empty, was cut off, repeats the
template's own words, or reaches another final answer than the reference, where the task has one. The data set never
shrinks: a refused rewrite leaves the reference in place. Knows nothing of the store or Hydra.
"""

import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sdd.answers import equal, extract
from sdd.data import Example
from sdd.models.chats import rewrite_prompt, task_text
from sdd.rewriting.engines import Answering, Completion, Request


@dataclass(frozen=True)
class Selection:
    """When a rewrite may be a target. `rule` is an answer rule of `sdd.answers`."""

    rule: str = "none"
    leak_phrases: tuple[str, ...] = ()

    def refusal(self, prompt: str, reference: str, rewrite: str, finish: str) -> str | None:
        """Why the rewrite is refused: "too_long", "empty", "truncated", "leak" or "answer"; None if it passes.

        A phrase that the task or its reference uses itself is no leak.
        """
        if finish == "too_long":
            return "too_long"
        if not rewrite.strip():
            return "empty"
        if finish != "stop":
            return "truncated"
        text, task_text = rewrite.casefold(), f"{prompt}\n{reference}".casefold()
        if any(phrase.casefold() in text and phrase.casefold() not in task_text for phrase in self.leak_phrases):
            return "leak"
        return "answer" if self.agrees(rewrite, reference) is False else None

    def agrees(self, text: str, reference: str) -> bool | None:
        """Whether both reach the same final answer; None where the reference has none."""
        expected, answer = extract(reference, self.rule), extract(text, self.rule)
        return None if expected is None else answer is not None and equal(answer, expected)


def _requests(examples: Sequence[Example], template: str, attempt: int) -> list[Request]:
    return [Request(e.id, rewrite_prompt(template, e.prompt, e.reference), attempt, e.before) for e in examples]


def rewrite_rows(
    engine: Answering, examples: Sequence[Example], template: str, selection: Selection | None
) -> Iterator[dict[str, Any]]:
    """A row per example, in order: {"id", "prompt", "reference", "rewrite", "finish"}, and "before" where there is.

    With several tries, a row is asked again until its rewrite passes the selection; the last one stands if none does.
    Without a selection every try is made; the first stands, and "others" has the rest.
    """
    if selection is None:
        tries = [
            {one.id: one for one in engine.complete(_requests(examples, template, attempt))}
            for attempt in range(engine.tries)
        ]
        for example in examples:
            first, *others = (answers[example.id] for answers in tries)
            rest = [{"rewrite": one.text, "finish": one.finish} for one in others]
            yield _row(example, first) | {"others": rest}
        return
    answers: dict[str, Completion] = {}
    pending = list(examples)
    for attempt in range(engine.tries):
        requests = _requests(pending, template, attempt)
        answers |= {completion.id: completion for completion in engine.complete(requests)}
        pending = [
            e
            for e in pending
            if selection.refusal(task_text(e.prompt, e.before), e.reference, answers[e.id].text, answers[e.id].finish)
            not in (None, "too_long")
        ]
        if not pending:
            break
    for example in examples:
        yield _row(example, answers[example.id])


def _row(example: Example, completion: Completion) -> dict[str, Any]:
    return {
        "id": example.id,
        **example.turns,
        "prompt": example.prompt,
        "reference": example.reference,
        "rewrite": completion.text,
        "finish": completion.finish,
    }


def task_of(row: Mapping[str, Any]) -> str:
    """All the words of a row's task."""
    return task_text(row["prompt"], row.get("before", ()))


def eligible(row: dict[str, Any], selection: Selection | None) -> list[str]:
    """The different rewrites of a row that may be its target, in the order of the tries."""
    tries = [row, *row.get("others", ())]
    texts = [
        one["rewrite"]
        for one in tries
        if (
            one["rewrite"].strip()
            if selection is None
            else selection.refusal(task_of(row), row["reference"], one["rewrite"], one["finish"]) is None
        )
    ]
    return list(dict.fromkeys(texts))


def chosen(row: dict[str, Any], selection: Selection | None, choose: Callable[[list[str]], str]) -> dict[str, Any]:
    """The row with the rewrite that `choose` takes of the eligible ones; as it is, where there is none."""
    own = {key: value for key, value in row.items() if key != "others"}
    texts = eligible(row, selection)
    if not texts:
        return own
    text = choose(texts)
    finish = next(one["finish"] for one in [row, *row.get("others", ())] if one["rewrite"] == text)
    return own | {"rewrite": text, "finish": finish}


def answer_correct(rule: Selection, reference: str) -> Callable[[list[str]], str]:
    """The first with the reference's final answer, or the first at all; it tells them apart where nothing else has."""
    return lambda texts: next((text for text in texts if rule.agrees(text, reference)), texts[0])


def shortest(texts: list[str]) -> str:
    """The one of the fewest characters, the first of several."""
    return min(texts, key=len)


REJECTED = ("leak", "answer")
"""Why a rewrite that has text and an end is refused."""


def choose_target(
    row: dict[str, Any], selection: Selection | None, gold_share: float, seed: int = 0, keep_rejected: bool = False
) -> dict[str, Any]:
    """A training row from a rewritten one: {"id", "prompt", "reference", "target", "source", "reason"}, and "before".

    `selection=None` takes every rewrite that has text; `gold_share` keeps the reference for that share of rows, drawn
    by row id. With `keep_rejected` there is also "rejected": a rewrite that was refused for what it says, or None.
    """
    if random.Random(f"gold {seed} {row['id']}").random() < gold_share:
        reason = "gold_share"
    elif selection is None:
        reason = "ok" if row["rewrite"].strip() else "empty"
    else:
        reason = selection.refusal(task_of(row), row["reference"], row["rewrite"], row["finish"]) or "ok"
    accepted = reason == "ok"
    return {
        "id": row["id"],
        **({"before": row["before"]} if "before" in row else {}),
        "prompt": row["prompt"],
        "reference": row["reference"],
        "target": row["rewrite"] if accepted else row["reference"],
        "source": "rewrite" if accepted else "reference",
        "reason": reason,
        **({"rejected": row["rewrite"] if reason in REJECTED else None} if keep_rejected else {}),
    }


class Held(Protocol):
    """Rows that are gone through more than once: a list, or lines of a file."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __getitem__(self, at: int) -> dict[str, Any]: ...


def with_noise(
    rows: Held, share: float, selection: Callable[[dict[str, Any]], Selection], seed: int = 0
) -> Iterator[dict[str, Any]]:
    """The rows of `choose_target`, with another row's kept rewrite in place of that share of the kept ones.

    The answer is then wrong and still in the teacher's own words: final answers differ, or where there are none, the
    texts. Rows are drawn by id and donors do not depend on the share, so that a larger share adds to a smaller one.
    `selection` gives a row's own, by whose rule answers are compared. A row without any such donor stays as it is.
    """
    order = array("q", (at for at, row in enumerate(rows) if row["source"] == "rewrite"))
    random.Random(f"donors {seed}").shuffle(order)
    places = array("q", bytes(8 * len(rows)))
    for place, at in enumerate(order):
        places[at] = place
    for at, row in enumerate(rows):
        if row["source"] != "rewrite" or random.Random(f"noise {seed} {row['id']}").random() >= share:
            yield row
            continue
        rule = selection(row)
        for step in range(1, len(order)):
            donor = rows[order[(places[at] + step) % len(order)]]
            if donor["target"] != row["target"] and not rule.agrees(donor["target"], row["reference"]):
                row = row | {"target": donor["target"], "reason": "noise"}
                break
        yield row
