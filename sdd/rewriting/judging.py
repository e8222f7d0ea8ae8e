"""A judge: a language model behind a server, asked which of several rewrites of a row is the best.

Source: LLM-as-a-judge, arXiv 2306.05685, whose judges prefer the place where an answer stands; so the order in which a
row's rewrites are shown is drawn by the row's id. The judge is shown text, decides nothing but which one is taken, and
says a number: anything else counts as unread. Whether its choices make a better student is not known here.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from sdd.models.served import Server
from sdd.rewriting.engines import Completion, Place, Request
from sdd.rewriting.server import OpenAIEngine

TEMPLATE = (
    "Task: {prompt}\n\nReference answer: {reference}\n\n{answers}\n\n"
    "Which of these answers does the task best: correct, complete and clear? Say its number and nothing else."
)
UNAIDED_TEMPLATE = TEMPLATE.replace("Reference answer: {reference}\n\n", "")
"""Where rewrites are made without the references."""

_PLACES = re.compile(r"\{(prompt|reference|answers)\}")


def question(template: str, prompt: str, reference: str, texts: Sequence[str], id: str) -> str:
    """The template with a row's task, its reference and its rewrites, numbered from 1 in the order of `shown`."""
    answers = "\n\n".join(f"Answer {number}:\n{texts[at]}" for number, at in enumerate(shown(id, len(texts)), 1))
    values = {"prompt": prompt, "reference": reference, "answers": answers}
    return _PLACES.sub(lambda place: values[place[1]], template)


def shown(id: str, number: int) -> list[int]:
    """The places of a row's rewrites in the order in which the judge sees them."""
    return random.Random(f"judge {id}").sample(range(number), number)


def verdict(completion: Completion, number: int) -> int | None:
    """The place of the rewrite that a judge chose of so many; None unless a whole answer has one number, and that is
    one of theirs. What stands before the end of a thought (`</think>`) is not looked at."""
    said = set(re.findall(r"\d+", completion.text.rpartition("</think>")[2]))
    places = {str(at): place for at, place in enumerate(shown(completion.id, number), 1)}
    return places.get(said.pop()) if completion.finish == "stop" and len(said) == 1 else None


class Judge(OpenAIEngine):
    """The model that a server calls `model`, asked greedily for a whole answer at the endpoint `chat`.

    Its tokenizer is not known here, so that how much it can read, its server says.
    """

    asked_by, group = "finetune.choice=judge", "judge"

    def __init__(self, model: str, max_new_tokens: int, server: Server | None) -> None:
        super().__init__(model, max_new_tokens=max_new_tokens)
        self.place = Place(server=server)

    def _prompt(self, request: Request) -> Any:
        return [{"role": "user", "content": request.prompt}]
