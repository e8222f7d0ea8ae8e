"""What the embedded teacher is trained on: conversations over the `teacher` split, rendered to token ids.

Most conversations answer a task in the teacher's own register; some answer it in the reference register, so that the
shift between the two is mild, as it is between a chat model and people's answers; the rest show a reference and ask
for a rewrite. Early in training, plain repetition and full lookups are mixed in: without them key-matched copying is
learnt late or not at all. Loss is taken on the answer only.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdd.prompts import REWRITE_TEMPLATE, answer_ids, chat_prompt_ids, rewrite_prompt
from sdd.tiny.tasks import FAMILIES, LETTERS, NOUNS, draw

OTHER_TEMPLATES = (
    "{prompt}\nHere is one way to answer: {reference}\nNow give your own answer.",
    "Question: {prompt}\nSomebody answered: {reference}\nHow would you put it?",
)
"""Two more rewriting requests, so that the teacher follows the request and not one fixed string."""

WEIGHTS = {"own": 0.72, "reference": 0.06, "rewrite": 0.22}
HARDER = ("word", "arithmetic", "count", "lookup")
"""Families that are drawn twice as often as the others: they are learnt last."""

PRACTICE = 0.25
"""Share of practice examples in the first part of training."""


@dataclass(frozen=True)
class Row:
    """Token ids of one conversation; the first `prompt_length` of them carry no loss."""

    ids: list[int]
    prompt_length: int


def _practice(rng: random.Random) -> tuple[str, str]:
    """Repeating a list, or reading out every price of a list in another order."""
    if rng.random() < 0.3:
        items = rng.sample(NOUNS, 4) if rng.random() < 0.5 else rng.sample(LETTERS, 6)
        return f"Repeat: {' '.join(items)}", f"The answer is {' '.join(items)}."
    keys = rng.sample(NOUNS if rng.random() < 0.7 else LETTERS, rng.randint(2, 5))
    pairs = [f"{key} {rng.randint(1, 9)}" for key in keys]
    shuffled = rng.sample(pairs, len(pairs))
    wanted = ", ".join(pair.split()[0] for pair in shuffled)
    return f"The list is {', '.join(pairs)}. Look up {wanted}.", f"The list says {', '.join(shuffled)}."


def conversation(rng: random.Random, practice: bool) -> tuple[str, str]:
    """A (prompt, answer) pair of the teacher-training mixture."""
    if practice and rng.random() < PRACTICE:
        return _practice(rng)
    task = draw(rng.choice([*FAMILIES, *HARDER]), "teacher", rng)
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind == "reference":
        return task.prompt, task.reference
    if kind == "rewrite":
        template = REWRITE_TEMPLATE if rng.random() < 0.6 else rng.choice(OTHER_TEMPLATES)
        return rewrite_prompt(template, task.prompt, task.reference), task.gold
    return task.prompt, task.gold


def batches(
    tokenizer: Any, seed: int, tokens_per_part: int, parts: int, part: int, practice: bool = False
) -> Iterator[list[Row]]:
    """Endless steps of random rows, sorted by length and cut into `parts` of equal cost; yields the given part.

    All parts of a step together mix the families, and each has rows of similar length. (Steps of one length are steps
    of one or two families: they pull one family at a time, and what needs matching by content was not learnt.)
    """
    rng = random.Random(f"{seed} {practice}")
    while True:
        rows: list[Row] = []
        budget = parts * tokens_per_part
        while budget > 0:
            prompt, answer = conversation(rng, practice)
            prefix = chat_prompt_ids(tokenizer, prompt)
            rows.append(Row(prefix + answer_ids(tokenizer, answer), len(prefix)))
            budget -= len(rows[-1].ids)
        rows.sort(key=lambda row: len(row.ids))
        total, seen, cut = sum(len(row.ids) for row in rows), 0, []
        for row in rows:
            if seen * parts // total == part:
                cut.append(row)
            seen += len(row.ids)
        yield cut


def final_answer_nats(model: Any, tokenizer: Any, per_family: int = 24) -> dict[str, float]:
    """Nats per token of the final line of dev answers, by family, the worked lines given: cheap, and falls to 0."""
    import torch

    found = {}
    for family in FAMILIES:
        rng = random.Random(f"monitor {family}")
        total, tokens = 0.0, 0
        for _ in range(per_family):
            task = draw(family, "dev", rng)
            head, _, final = task.gold.rpartition("\n")
            worked = tokenizer(head + "\n", add_special_tokens=False)["input_ids"]
            prefix = chat_prompt_ids(tokenizer, task.prompt) + worked
            ids = torch.tensor([prefix + answer_ids(tokenizer, final)])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prefix) - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(prefix) :], reduction="sum"))
            tokens += ids.shape[1] - len(prefix)
        found[family] = total / tokens
    return found
