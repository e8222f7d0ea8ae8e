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
PRACTICE = 0.25
"""Share of practice examples in the first part of training."""


@dataclass(frozen=True)
class Row:
    """Token ids of one conversation; the first `prompt_length` of them carry no loss."""

    ids: list[int]
    prompt_length: int


def _practice(rng: random.Random) -> tuple[str, str]:
    """Repeating a list, or reading out every price of a list in another order."""
    if rng.random() < 0.5:
        items = rng.sample(NOUNS, 4) if rng.random() < 0.5 else rng.sample(LETTERS, 6)
        return f"Repeat: {' '.join(items)}", f"The answer is {' '.join(items)}."
    keys = rng.sample(NOUNS, rng.randint(2, 5))
    pairs = [f"{key} {rng.randint(1, 99)}" for key in keys]
    shuffled = rng.sample(pairs, len(pairs))
    wanted = ", ".join(pair.split()[0] for pair in shuffled)
    return f"The list is {', '.join(pairs)}. Look up {wanted}.", f"The list says {', '.join(shuffled)}."


def conversation(rng: random.Random, practice: bool) -> tuple[str, str]:
    """A (prompt, answer) pair of the teacher-training mixture."""
    if practice and rng.random() < PRACTICE:
        return _practice(rng)
    task = draw(rng.choice(list(FAMILIES)), "teacher", rng)
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind == "reference":
        return task.prompt, task.reference
    if kind == "rewrite":
        template = REWRITE_TEMPLATE if rng.random() < 0.6 else rng.choice(OTHER_TEMPLATES)
        return rewrite_prompt(template, task.prompt, task.reference), task.gold
    return task.prompt, task.gold


def batches(
    tokenizer: Any, seed: str, tokens_per_batch: int, practice: bool = False, pool: int = 256
) -> Iterator[list[Row]]:
    """Endless batches of similar length, at most `tokens_per_batch` padded tokens each; a function of `seed` alone."""
    rng = random.Random(seed)
    while True:
        rows = []
        for _ in range(pool):
            prompt, answer = conversation(rng, practice)
            prefix = chat_prompt_ids(tokenizer, prompt)
            rows.append(Row(prefix + answer_ids(tokenizer, answer), len(prefix)))
        rows.sort(key=lambda row: len(row.ids))
        cut: list[list[Row]] = [[]]
        for row in rows:
            if (len(cut[-1]) + 1) * len(row.ids) > tokens_per_batch:
                cut.append([])
            cut[-1].append(row)
        rng.shuffle(cut)
        yield from cut
