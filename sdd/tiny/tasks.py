"""Procedural instruction tasks for the embedded model: eight families, four disjoint splits, two registers.

Every instance comes with two worked answers that carry the same information: `gold`, in the register the embedded
teacher speaks, and `reference`, as another writer would put it. A split is a function of the *content* of an instance
(its `key`: the numbers and operators, the letters, the facts asked for), never of its wording, so the four splits are
disjoint by construction whatever the seed.

    python -m sdd.tiny.tasks --split test --seed 7 --n 8

Knows nothing of tokenizers, models or torch.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations

SPLITS = {"teacher": range(29), "pool": range(29, 37), "dev": range(37, 38), "test": range(38, 40)}
BUCKETS = 40


@dataclass(frozen=True)
class Instance:
    """One task. `key` is its canonical content; equal keys are the same task in other words."""

    family: str
    key: str
    prompt: str
    answer: str
    gold: str
    reference: str

    @property
    def id(self) -> str:
        return f"{self.family}-{hashlib.md5(self.key.encode(), usedforsecurity=False).hexdigest()[:12]}"


def split_of(key: str) -> str:
    """The split that owns a canonical instance: md5(key) mod 40."""
    bucket = int(hashlib.md5(key.encode(), usedforsecurity=False).hexdigest(), 16) % BUCKETS
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


# ---- wording shared by the families -----------------------------------------------------------------------------

NAMES = ["Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Joy", "Kim", "Leo", "Mia", "Ned", "Ola"]
ITEMS = ["apples", "books", "cards", "coins", "cups", "eggs", "hats", "keys", "pens", "shells", "stamps", "toys"]
NOUNS = [
    *("ball", "bell", "bird", "boat", "bread", "cake", "chair", "cloud", "corn", "desk", "door", "drum", "fish"),
    *("fork", "goat", "hill", "horse", "lamp", "leaf", "milk", "moon", "nest", "nut", "pot", "rain", "ring", "road"),
    *("rope", "salt", "sand", "ship", "shoe", "snow", "soap", "sock", "star", "stone", "tree", "wall", "wind"),
]
LETTERS = "abcdefghijklmnopqrstuvwxyz"
OPENERS = ["", "", "ok so\n", "lets see\n", "hm\n", "right\n", "easy one\n", "well\n"]
TAILS = ["", "", " i guess", " yeah", " for sure", " then", " i think", " no doubt"]
ENDINGS = ["#### {}", "ans: {}"]


def _casual(rng: random.Random, lines: list[str], answer: str) -> str:
    """Join worked lines in the reference register: an opener, loose line tails, a terse ending."""
    body = [line + rng.choice(TAILS) for line in lines]
    return rng.choice(OPENERS) + "\n".join([*body, rng.choice(ENDINGS).format(answer)])


def _formal(lines: list[str], answer: str) -> str:
    return "\n".join([*lines, f"The answer is {answer}."])


def _instance(
    rng: random.Random, family: str, key: str, prompt: str, answer: str, gold: list[str], loose: list[str]
) -> Instance:
    """The task, and its worked lines in both registers."""
    return Instance(family, key, prompt, answer, _formal(gold, answer), _casual(rng, loose, answer))


# ---- chains of arithmetic: word problems and bare expressions ---------------------------------------------------

LIMIT = 40
STARTS = range(2, 21)
LENGTHS = (2, 3)
"""Steps of a chain."""


def _chain(rng: random.Random) -> tuple[int, list[tuple[int, str, int, int]]]:
    """A start and two or three steps (before, operator, operand, after), all values in 0..LIMIT."""
    start = value = rng.choice(STARTS)
    steps = []
    for _ in range(rng.choice(LENGTHS)):
        operator, operands = _operands(value, rng.choice("++--*"))
        steps.append(_step(value, operator, rng.choice(operands)))
        value = steps[-1][3]
    return start, steps


def _operands(value: int, operator: str) -> tuple[str, range]:
    """The operator that a value bears, and what may stand after it."""
    if operator == "*" and value * 2 > LIMIT:
        operator = "-"
    if operator == "-" and value < 2:
        operator = "+"
    most = {"+": 9, "-": min(value, 9), "*": max(2, min(3, LIMIT // max(value, 1)))}[operator]
    return operator, range(1 if operator == "-" else 2, most + 1)


def _step(value: int, operator: str, operand: int) -> tuple[int, str, int, int]:
    after = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
    if after > LIMIT:
        return value, "-", min(value, 9), value - min(value, 9)
    return value, operator, operand, after


@cache
def _chain_keys() -> set[str]:
    """The keys of all chains that there are."""
    chains: list[tuple[int, list[tuple[int, str, int, int]]]] = [(start, []) for start in STARTS]
    found: set[str] = set()
    for length in range(1, max(LENGTHS) + 1):
        longer = []
        for start, steps in chains:
            value = steps[-1][3] if steps else start
            nexts = {_step(value, own, k) for operator in "+-*" for own, ks in [_operands(value, operator)] for k in ks}
            longer += [(start, [*steps, step]) for step in nexts]
        chains = longer
        if length in LENGTHS:
            found |= {_chain_key(start, steps) for start, steps in chains}
    return found


def _chain_key(start: int, steps: list[tuple[int, str, int, int]]) -> str:
    """The same key for a word problem and a bare expression: their splits hold apart the computation itself."""
    return f"chain {start}" + "".join(f" {op} {operand}" for _, op, operand, _ in steps)


def word(rng: random.Random) -> Instance:
    """A short story whose result takes two or three worked steps."""
    start, steps = _chain(rng)
    name, items = rng.choice(NAMES), rng.choice(ITEMS)
    templates = {
        "+": ["{n} buys {k} more", "{n} finds {k} more", "a friend brings {k} more"],
        "-": ["{n} gives away {k}", "{n} loses {k}", "{n} sells {k}"],
        "*": ["{n} ends up with {k} times as many", "the number grows {k} times"],
    }
    events = [rng.choice(templates[op]).format(n=name, k=operand) for _, op, operand, _ in steps]
    story = ". ".join(f"Then {event}" for event in events)
    question = rng.choice([f"How many {items} does {name} have now?", f"How many {items} are there in the end?"])
    sums = [f"{a} {op} {b} = {c}" for a, op, b, c in steps]
    answer = str(steps[-1][3])
    gold = rng.choice(
        [
            [f"Start with {start} {items}.", *(f"Step {i}: {s}." for i, s in enumerate(sums, 1))],
            [f"{name} has {start} {items} at first.", *(f"Then {s}." for s in sums)],
            [f"We begin at {start}.", *(f"Now we have {s} {items}." for s in sums)],
        ]
    )
    forms = ["{} " + items + " after that", "{} now", "so {}", "thats {} " + items]
    reference = [rng.choice(forms).format(s) for s in sums]
    return _instance(
        rng,
        "word",
        _chain_key(start, steps),
        f"{name} has {start} {items}. {story}. {question}",
        answer,
        gold,
        reference,
    )


def arithmetic(rng: random.Random) -> Instance:
    """A chain of operations, evaluated from left to right."""
    start, steps = _chain(rng)
    expression = str(start) + "".join(f" {op} {operand}" for _, op, operand, _ in steps)
    request = rng.choice(
        ["Work out from left to right: {}", "Calculate step by step: {}", "Going from the left, what is {}?"]
    )
    sums = [f"{a} {op} {b} = {c}" for a, op, b, c in steps]
    answer = str(steps[-1][3])
    gold = rng.choice(
        [
            [f"{s}." for s in sums],
            [f"First {sums[0]}.", *(f"Next {s}." for s in sums[1:])],
            [f"Step {i}: {s}." for i, s in enumerate(sums, 1)],
        ]
    )
    forms = ["{}", "got {}", "{} so far", "so {}"]
    return _instance(
        rng,
        "arithmetic",
        _chain_key(start, steps),
        request.format(expression),
        answer,
        gold,
        [rng.choice(forms).format(s) for s in sums],
    )


# ---- sequences --------------------------------------------------------------------------------------------------


def sort(rng: random.Random) -> Instance:
    """Letters into alphabetical order."""
    letters = rng.sample(LETTERS, rng.randint(4, 6))
    sequence, answer = " ".join(letters), " ".join(sorted(letters))
    request = rng.choice(["Sort these letters: {}", "Put in alphabetical order: {}", "Order the letters {}"])
    gold = rng.choice(
        [
            [f"In order they are {answer}."],
            [f"The first is {min(letters)}.", f"Sorted, this gives {answer}."],
            [f"From {sequence} we get {answer}."],
        ]
    )
    forms = ["in order its {}", "sorted {}", "that goes {}", "{} is the order"]
    return _instance(
        rng,
        "sort",
        f"sort {sequence}",
        request.format(sequence),
        answer,
        gold,
        [rng.choice(forms).format(answer)],
    )


def reverse(rng: random.Random) -> Instance:
    """A list of words, read backwards."""
    words = rng.sample(NOUNS, rng.randint(3, 5))
    sequence, answer = " ".join(words), " ".join(reversed(words))
    request = rng.choice(["Reverse this list: {}", "Say these words backwards: {}", "Turn the list around: {}"])
    gold = rng.choice(
        [
            [f"The last word is {words[-1]}.", f"Backwards it reads {answer}."],
            [f"Reversed, the list is {answer}."],
            [f"We read {sequence} from the end.", f"This gives {answer}."],
        ]
    )
    forms = ["from the back its {}", "turned around {}", "backwards thats {}", "{} if you flip it"]
    return _instance(
        rng,
        "reverse",
        f"reverse {sequence}",
        request.format(sequence),
        answer,
        gold,
        [rng.choice(forms).format(answer)],
    )


def rotate(rng: random.Random) -> Instance:
    """A list of words, one of its ends moved to the other."""
    words = rng.sample(NOUNS, rng.randint(3, 5))
    end, place = rng.choice([("first", "end"), ("last", "front")])
    moved = words[0] if end == "first" else words[-1]
    rest = words[1:] if end == "first" else words[:-1]
    sequence, answer = " ".join(words), " ".join([*rest, moved] if end == "first" else [moved, *rest])
    request = rng.choice(
        [
            "Move the {e} word to the {p}: {g}",
            "In this list the {e} word goes to the {p}: {g}",
            "Take the {e} word and put it at the {p}: {g}",
        ]
    )
    gold = rng.choice(
        [
            [f"The {end} word is {moved}.", f"With it moved we get {answer}."],
            [f"After the move the list is {answer}."],
            [f"Without {moved} it reads {' '.join(rest)}.", f"At the {place} it makes {answer}."],
        ]
    )
    forms = ["moving {m} its {a}", "{m} goes over so {a}", "then it reads {a}", "{a} once {m} is moved"]
    return _instance(
        rng,
        "rotate",
        f"rotate {end} {sequence}",
        request.format(e=end, p=place, g=sequence),
        answer,
        gold,
        [rng.choice(forms).format(m=moved, a=answer)],
    )


def shift(rng: random.Random) -> Instance:
    """Each letter replaced by the next one of the alphabet."""
    letters = [rng.choice(LETTERS[:-1]) for _ in range(rng.randint(3, 5))]
    after = [LETTERS[LETTERS.index(letter) + 1] for letter in letters]
    sequence, answer = " ".join(letters), " ".join(after)
    request = rng.choice(["Move each letter one on: {}", "Replace every letter by the next: {}", "Shift by one: {}"])
    pairs = [f"{a} to {b}" for a, b in zip(letters, after, strict=True)]
    gold = rng.choice(
        [
            [f"We take {', '.join(pairs)}."],
            [f"The letter {letters[0]} becomes {after[0]}.", f"All together we get {answer}."],
            [f"One on from {sequence} is {answer}."],
        ]
    )
    lines = rng.choice([[", ".join(pairs)], [f"one up its {answer}"], [f"{letters[0]} goes {after[0]} and so on"]])
    return _instance(
        rng,
        "shift",
        f"shift {sequence}",
        request.format(sequence),
        answer,
        gold,
        lines,
    )


def initials(rng: random.Random) -> Instance:
    """The first letter of each word of a list."""
    words = rng.sample(NOUNS, rng.randint(3, 5))
    sequence, answer = " ".join(words), " ".join(word[0] for word in words)
    request = rng.choice(["Give the first letters of {}", "Which letters do these begin with: {}", "Initials of {}"])
    pairs = [f"{word} {word[0]}" for word in words]
    gold = rng.choice(
        [
            [f"The letters are {', '.join(pairs)}."],
            [f"The word {words[0]} begins with {words[0][0]}.", f"All together we get {answer}."],
            [f"From {sequence} we keep {answer}."],
        ]
    )
    lines = rng.choice([[", ".join(pairs)], [f"they start {answer}"], [f"{words[0]} has {words[0][0]} and so on"]])
    return _instance(
        rng,
        "initials",
        f"initials {sequence}",
        request.format(sequence),
        answer,
        gold,
        lines,
    )


# ---- memory in the weights --------------------------------------------------------------------------------------

CREATURES = [
    start + end
    for start in ("Bo", "Du", "Ka", "Mi", "Ro", "Ta", "Vi", "Zu")
    for end in ("fin", "lop", "mar", "nex", "rik")
]
WORLD_VALUES = {
    "colour": ["red", "blue", "green", "black", "white", "pink", "grey", "gold"],
    "food": ["plums", "seeds", "moss", "honey", "grass", "beans", "rice", "figs"],
    "home": ["caves", "lakes", "dunes", "woods", "bogs", "cliffs", "fields", "reefs"],
    "sound": ["hums", "clicks", "barks", "sings", "growls", "chirps", "howls", "snores"],
}
_QUESTIONS = {
    "colour": "what colour is the {}",
    "food": "what does the {} eat",
    "home": "where does the {} live",
    "sound": "what sound does the {} make",
}
_STATEMENTS = {
    "colour": "The {} is {}.",
    "food": "The {} eats {}.",
    "home": "The {} lives in {}.",
    "sound": "The {} {}.",
}


def _world() -> dict[tuple[str, str], str]:
    rng = random.Random("a made-up world")
    return {
        (creature, attribute): rng.choice(values)
        for creature in CREATURES
        for attribute, values in WORLD_VALUES.items()
    }


WORLD = _world()
"""(creature, attribute) -> value: 160 facts that exist nowhere but in the weights. Splits hold apart pairs of facts."""


def stated(creature: str, attribute: str, value: str) -> str:
    """A fact as a sentence, true or not."""
    return _STATEMENTS[attribute].format(creature, value)


def _fact_key(pair: Iterable[tuple[str, str]]) -> str:
    return "fact " + ", ".join(sorted(f"{creature} {attribute}" for creature, attribute in pair))


def fact(rng: random.Random) -> Instance:
    """Two facts of a made-up world, asked together. Every fact is in every split; the pairs are not."""
    (first, second) = rng.sample(sorted(WORLD), 2)
    answer = f"{WORLD[first]} {WORLD[second]}"
    questions = [_QUESTIONS[attribute].format(creature) for creature, attribute in (first, second)]
    facts = [stated(creature, attribute, WORLD[creature, attribute]) for creature, attribute in (first, second)]
    prompt = rng.choice(["Tell me {} and {}?", "Do you know {} and {}?", "Two questions: {} and {}?"]).format(
        *questions
    )
    gold = rng.choice([facts, [" ".join(facts)], ["We know two things.", *facts]])
    forms = ["{1} for the {0}", "the {0} has {1}", "{0} means {1}", "{1} with the {0}"]
    lines = [rng.choice(forms).format(creature, WORLD[creature, attribute]) for creature, attribute in (first, second)]
    return _instance(
        rng,
        "fact",
        _fact_key((first, second)),
        prompt,
        answer,
        gold,
        lines,
    )


# ---- drawing ----------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Callable[[random.Random], Instance]] = {
    family.__name__: family for family in (word, arithmetic, sort, reverse, rotate, shift, initials, fact)
}


PLENTY = {"teacher": 9_000, "pool": 2_500, "dev": 300, "test": 600}
"""Instances that a split has of every family: up to here nothing needs counting."""
MOST = 200_000
"""Instances of a family that are drawn at most; only chains and facts have fewer, the other families have millions."""


@cache
def available(split: str, family: str) -> int:
    """How many distinct instances of a family can be drawn from a split."""
    if family in ("word", "arithmetic"):
        keys: Iterable[str] = _chain_keys()
    elif family == "fact":
        keys = (_fact_key(pair) for pair in combinations(sorted(WORLD), 2))
    else:
        return MOST
    return sum(split_of(key) == split for key in keys)


def check_available(split: str, n: int, families: list[str]) -> None:
    """Refuse at once more instances than there are, the families in turn."""
    if n <= PLENTY[split] * len(families):
        return
    most = len(families) * min(available(split, family) for family in families)
    if n > most:
        raise ValueError(f"{n:,} of the embedded tasks, but the {split} split has {most:,} of these families")


def draw(family: str, split: str, rng: random.Random) -> Instance:
    """One instance of a family that belongs to the split."""
    while True:
        instance = FAMILIES[family](rng)
        if split_of(instance.key) == split:
            return instance


def instances(split: str, seed: int, n: int, families: list[str] | None = None) -> Iterator[Instance]:
    """`n` distinct instances of a split, the families in turn. A prefix of a longer draw with the same arguments."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    names = list(families or FAMILIES)
    if unknown := set(names) - set(FAMILIES):
        raise ValueError(f"unknown family {sorted(unknown)[0]!r}; choose from {', '.join(FAMILIES)}")
    check_available(split, n, names)
    rng = random.Random(f"{split} {seed}")
    seen: set[tuple[str, str]] = set()
    for i in range(n):
        family = names[i % len(names)]
        for _ in range(10_000):
            instance = draw(family, split, rng)
            if (family, instance.key) not in seen:
                break
        else:
            raise ValueError(f"the {split} split has no {n} distinct {family!r} instances; ask for fewer")
        seen.add((family, instance.key))
        yield instance


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sdd.tiny.tasks", description="Print fresh instances as JSONL.")
    parser.add_argument("--split", choices=list(SPLITS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=8, help="how many, the families in turn")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="only these families")
    arguments = parser.parse_args(argv)
    for instance in instances(arguments.split, arguments.seed, arguments.n, arguments.family):
        row = {key: getattr(instance, key) for key in ("family", "prompt", "answer", "reference")}
        print(json.dumps(row))


if __name__ == "__main__":
    main()
