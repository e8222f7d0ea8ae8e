"""The teacher's register in several wordings: a `gold` answer put otherwise, its facts and final answer kept.

A teacher that was taught these speaks no fixed string: what it says to one task varies with the task, so that a rewrite
is more than the answer it would have been given (`python -m sdd.tiny.train --paraphrases`).
"""

import random
import re

from sdd.tiny.tasks import Instance

OPENERS = ["", "", "", "Let us see.", "Here is how it goes.", "We take it slowly.", "This is how I see it."]
ENDINGS = ["The answer is {}.", "So the answer is {}.", "Thus the answer is {}.", "In short, the answer is {}."]
WORDINGS = {
    r"^Start with ": ["Start with ", "Begin with ", "At the start there are "],
    r"^We begin at ": ["We begin at ", "The count starts at ", "Our first number is "],
    r"\bStep (\d):": [r"Step \1:", r"Part \1:", r"\1)"],
    r"^(Then|Next) ": ["Then ", "Next ", "After that ", "From there "],
    r"^First ": ["First ", "To begin, ", "At first "],
    r"^Now we have ": ["Now we have ", "That leaves us with ", "Which makes "],
    r"^(This gives|All together we get) ": ["This gives ", "All together we get ", "Put together that is "],
    r"^In order they are ": ["In order they are ", "The right order is ", "From low to high they go "],
    r"^(Reversed, the list is|Backwards it reads) ": [
        "Reversed, the list is ",
        "Backwards it reads ",
        "The other way it says ",
    ],
    r"^(After the move the list is|With it moved we get) ": ["After the move the list is ", "With it moved we get "],
    r"^We take ": ["We take ", "We go from ", "The steps are "],
    r"^The letters are ": ["The letters are ", "Word by word we find ", "The first letters read "],
    r"^We know two things\.": ["We know two things.", "Two facts are known.", "Both are known."],
}
"""A pattern of the base wording -> what may stand in its place."""


def paraphrased(instance: Instance, rng: random.Random) -> str:
    """The gold answer in one of its wordings; the base wording is one of them."""
    lines = instance.gold.split("\n")[:-1]
    for pattern, wordings in WORDINGS.items():
        wording = rng.choice(wordings)
        lines = [re.sub(pattern, wording, line) for line in lines]
    opener, ending = rng.choice(OPENERS), rng.choice(ENDINGS)
    return "\n".join([*([opener] if opener else []), *lines, ending.format(instance.answer)])
