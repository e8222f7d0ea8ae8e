"""How far the references stand from the teacher's own words, as a dial; and how much of their reasoning is there.

`medium` is the reference that a task brings. `mild` is the teacher's own answer in loose clothes: small letters, no
full stops, a terse ending. `strong` is the reference as people type on a phone, its vowels left out. All three work
out the same lines and end in the same answer.
"""

import re

from sdd.tiny.tasks import Instance

REGISTERS = ("mild", "medium", "strong")


def reference_of(task: Instance, register: str = "medium", reasoning: float = 1.0) -> str:
    """The task's reference answer in a register, with that share of its worked lines, the last ones."""
    *lines, ending = (task.gold if register == "mild" else task.reference).split("\n")
    if register == "mild":
        lines, ending = [line.lower().rstrip(".") for line in lines], f"ans: {task.answer}"
    elif register == "strong":
        kept = set(task.answer.split())
        lines = [re.sub(r"[A-Za-z]{4,}", lambda word: _typed(word[0], kept), line) for line in lines]
    first = len(lines) - round(reasoning * len(lines))
    return "\n".join([*lines[first:], ending])


def _typed(word: str, kept: set[str]) -> str:
    """A word without its vowels but the first letter; words of the answer stay."""
    return word if word in kept else word[0] + re.sub(r"[aeiou]", "", word[1:])
