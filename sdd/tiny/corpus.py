"""What the embedded teacher is trained on: conversations over the `teacher` split, rendered to token ids.

Most conversations answer a task in the teacher's own register; some answer it in the reference register, so that the
shift between the two is mild, as it is between a chat model and people's answers; the rest show a reference and ask
for a rewrite. Early in training, plain repetition is mixed in, so that copying is learnt early. Loss is taken on the
answer only.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdd.answers import equal, extract
from sdd.models.chats import REWRITE_TEMPLATE, answer_ids, chat_prompt_ids, rewrite_prompt
from sdd.tiny.paraphrases import paraphrased
from sdd.tiny.tasks import FAMILIES, LETTERS, NOUNS, draw, instances

OTHER_TEMPLATES = (
    "{prompt}\nHere is one way to answer: {reference}\nNow give your own answer.",
    "Question: {prompt}\nSomebody answered: {reference}\nHow would you put it?",
)
"""Two more rewriting requests, so that the teacher follows the request and not one fixed string."""

WEIGHTS = {"own": 0.72, "reference": 0.06, "rewrite": 0.22}
HARDER = ("word", "arithmetic", "fact")
"""Families that are drawn twice as often as the others: they are learnt last."""

PRACTICE = 0.25
"""Share of practice examples in the first part of training."""
BATCHES_PER_PART = 2


@dataclass(frozen=True)
class Row:
    """Token ids of one conversation; the first `prompt_length` of them carry no loss."""

    ids: list[int]
    prompt_length: int


def _practice(rng: random.Random) -> tuple[str, str]:
    """Repeating a list."""
    items = rng.sample(NOUNS, rng.randint(3, 6)) if rng.random() < 0.5 else rng.sample(LETTERS, rng.randint(4, 8))
    return f"Repeat: {' '.join(items)}", f"The answer is {' '.join(items)}."


def conversation(rng: random.Random, practice: bool, paraphrases: bool = False) -> tuple[str, str]:
    """A (prompt, answer) pair of the teacher-training mixture; its own register in one wording or in several."""
    if practice and rng.random() < PRACTICE:
        return _practice(rng)
    task = draw(rng.choice([*FAMILIES, *HARDER]), "teacher", rng)
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind == "reference":
        return task.prompt, task.reference
    gold = paraphrased(task, rng) if paraphrases else task.gold
    if kind == "rewrite":
        template = REWRITE_TEMPLATE if rng.random() < 0.6 else rng.choice(OTHER_TEMPLATES)
        return rewrite_prompt(template, task.prompt, task.reference), gold
    return task.prompt, gold


def batches(
    tokenizer: Any,
    seed: int,
    tokens_per_part: int,
    parts: int,
    part: int,
    practice: bool = False,
    paraphrases: bool = False,
) -> Iterator[list[list[Row]]]:
    """Endless steps of random rows; yields the given part of each, as batches of similar length to pad little.

    All parts of a step together mix the families. (Steps of one length are steps of one or two families: they pull one
    family at a time, and what needs matching by content was not learnt.)
    """
    rng = random.Random(f"{seed} {practice}")
    while True:
        rows: list[Row] = []
        budget = parts * tokens_per_part
        while budget > 0:
            prompt, answer = conversation(rng, practice, paraphrases)
            prefix = chat_prompt_ids(tokenizer, prompt)
            rows.append(Row(prefix + answer_ids(tokenizer, answer), len(prefix)))
            budget -= len(rows[-1].ids)
        rows.sort(key=lambda row: len(row.ids))
        total, seen = sum(len(row.ids) for row in rows), 0
        cuts: list[list[Row]] = [[] for _ in range(parts * BATCHES_PER_PART)]
        for row in rows:
            cuts[seen * len(cuts) // total].append(row)
            seen += len(row.ids)
        shares: list[list[list[Row]]] = [[] for _ in range(parts)]
        costs = [0] * parts
        for cut in sorted(cuts, key=_padded_tokens, reverse=True):
            cheapest = costs.index(min(costs))
            shares[cheapest].append(cut)
            costs[cheapest] += _padded_tokens(cut)
        yield shares[part]


def _padded_tokens(rows: list[Row]) -> int:
    return len(rows) * max((len(row.ids) for row in rows), default=0)


def exact_match(model: Any, tokenizer: Any, per_family: int = 16) -> dict[str, float]:
    """Share of right final answers to dev tasks by family, greedy: how training is going."""
    import torch

    shares = {}
    for family in FAMILIES:
        tasks = list(instances("dev", 3, per_family, [family]))
        prompts = [chat_prompt_ids(tokenizer, task.prompt) for task in tasks]
        longest = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=80, do_sample=False)
        texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        right = [equal(extract(text, "final") or "", task.answer) for text, task in zip(texts, tasks, strict=True)]
        shares[family] = sum(right) / per_family
    return shares
