"""The embedded model's tasks: what is asked, what counts as right. Pure data; running them is `harness`'s business.

`word` ... `fact`: free-form answers, exact match of the final answer. Strict: the last line states it in one of the
known forms, the teacher's ("The answer is 7.") or the other writers' ("#### 7", "ans: 7"), so that no arm is marked
down for its register. Lenient: such a line anywhere. Malformed: the last line states no answer at all.
`fact_choice`: four candidates by likelihood. `nll`: the likelihood of answers in the teacher's own register.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

from sdd.errors import UserError
from sdd.tiny.tasks import FAMILIES, WORLD, WORLD_VALUES, Instance, instances, stated

DEFAULT_LIMIT = 100
MOST_ITEMS = 500
"""Items of a task; a split has few distinct ones, and drawing takes longer the fewer are left."""
CHOICES = 4
KINDS = {"fact_choice": "choice", "nll": "likelihood"}


@dataclass(frozen=True)
class Item:
    """One question. `choices` only for choice tasks (the right one is `answer`); `gold` only for likelihood tasks."""

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    gold: str | None = None


@dataclass(frozen=True)
class Task:
    """`kind`: "free" (generate, compare the final answer), "choice" (by likelihood) or "likelihood" (nats a token)."""

    name: str
    kind: str
    items: tuple[Item, ...]


def _choice(instance: Instance) -> Item:
    """Candidates state both facts; wrong ones change one of the two to another value of its attribute."""
    rng = random.Random(f"choices {instance.key}")
    facts = [(who, what) for who, what in (part.split(" ") for part in instance.key.removeprefix("fact ").split(", "))]
    if " ".join(WORLD[asked] for asked in facts) != instance.answer:
        facts.reverse()  # the key is sorted, the question need not be
    right = [WORLD[asked] for asked in facts]
    wrong: list[list[str]] = []
    while len(wrong) < CHOICES - 1:
        place = rng.randrange(2)
        values = [*right]
        values[place] = rng.choice(WORLD_VALUES[facts[place][1]])
        if values not in (right, *wrong):
            wrong.append(values)
    candidates = [
        " ".join(stated(who, what, value) for (who, what), value in zip(facts, values, strict=True))
        for values in (right, *wrong)
    ]
    return Item(instance.id, instance.prompt, candidates[0], tuple(rng.sample(candidates, CHOICES)))


def suite_tasks(suite: str, names: list[str] | None, split: str, seed: int, limit: int | None) -> dict[str, Task]:
    """The tasks of an evaluation, `limit` items each, drawn from the `dev` or `test` split by `seed`."""
    if suite != "tiny":
        raise UserError(f"evaluation.suite={suite} is unknown; choose tiny")
    if split not in ("dev", "test"):
        raise UserError(f"evaluation.split={split} is no evaluation split; choose dev or test")
    if limit is not None and limit > MOST_ITEMS:
        raise UserError(f"evaluation.limit={limit}: embedded tasks have up to {MOST_ITEMS} items; ask for fewer")
    known = [*FAMILIES, *KINDS]
    wrong = sorted(set(names or ()) - set(known))
    if wrong:
        raise UserError(f"evaluation.tasks: {wrong[0]} is unknown; choose from {', '.join(known)}")
    return {name: _task(name, split, seed, limit or DEFAULT_LIMIT) for name in (names or known)}


@lru_cache(maxsize=64)
def _task(name: str, split: str, seed: int, limit: int) -> Task:
    try:
        if name == "fact_choice":
            drawn = instances(split, seed + 1_000, limit, ["fact"])
            return Task(name, "choice", tuple(_choice(i) for i in drawn))
        if name == "nll":
            drawn = instances(split, seed + 2_000, limit)
            return Task(name, "likelihood", tuple(Item(i.id, i.prompt, i.answer, gold=i.gold) for i in drawn))
        return Task(name, "free", tuple(Item(i.id, i.prompt, i.answer) for i in instances(split, seed, limit, [name])))
    except ValueError as error:
        raise UserError(f"evaluation.limit={limit}: {error}") from None
