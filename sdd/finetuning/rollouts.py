"""On-policy rows: before a step, the student's own answers take the place of a share of the step's targets.

Generalised knowledge distillation (GKD, Agarwal et al. 2023, arXiv 2306.13649): on sequences that the student samples
itself it learns the probabilities that the teacher has at every one of their tokens; no gradient passes through the
sampling. Which rows those are is drawn row by row here, batch by batch there.

That the rollouts of a pruned model begin short and lose their loops is after ShortOPD (arXiv 2607.13124), of which the
abstract was read. There a loop counts once the teacher confirms it, and lengths follow those that the student makes use
of; here a loop is told by its tokens alone, and lengths grow by a schedule.

Rows are answered in windows of several steps, so that a batch of answers is full: the student in training is then up to
`window` - 1 steps older than the one that wrote. Knows nothing of how an answer is sampled, or of the loss.
"""

import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm

from sdd.finetuning.modes import rollout_limit
from sdd.finetuning.module import TrainingRow
from sdd.forward import ranks
from sdd.forward.decoding import Ending

PERIOD, REPEATS, LOOP = 64, 4, 16
"""A loop is a period of at most so many tokens, said at least so often, and so many tokens long at least."""

Sample = Callable[[Any, Sequence[list[int]], Sequence[str], int, Ending], Iterator[tuple[int, list[int]]]]
"""A model, prompts, a name for each on which alone its draw depends, tokens at most, where a row ends -> (index of the
prompt, its new tokens), as the rows end."""
Place = tuple[int, int]
"""A step, and a place in its rows."""


def looped(tokens: Sequence[int]) -> int | None:
    """How many tokens of an answer that ends in a loop are kept: up to the first of those that were said before.

    There the teacher is still asked what should have come. None where there is no loop.
    """
    count = len(tokens)
    for period in range(1, min(PERIOD, count // REPEATS) + 1):
        compared = range(1, count - period + 1)
        alike = next((at - 1 for at in compared if tokens[-at] != tokens[-at - period]), count - period)
        if alike + period >= max(REPEATS * period, LOOP):
            return count - alike + 1
    return None


def loop_ends(tokens: list[int], fresh: int) -> int | None:
    """Where an answer is cut whose first loop is closed by one of its `fresh` last tokens: an ending of `decode`."""
    cuts = (looped(tokens[:end]) for end in range(len(tokens) - fresh + 1, len(tokens) + 1))
    return next((cut for cut in cuts if cut is not None), None)


@dataclass(frozen=True)
class Policy:
    """What is rolled out: `share` of the rows, from `tokens[0]` tokens at most to `tokens[1]`, for `window` steps."""

    share: float
    tokens: tuple[int, int]
    window: int
    seed: int
    steps: int

    def drawn(self, step: int, count: int) -> list[int]:
        """The places of a step's rows that the student answers: a larger share adds to a smaller one."""
        draw = random.Random(f"rollouts {self.seed} {step}")
        return [place for place in range(count) if draw.random() < self.share]

    def begins(self, step: int) -> int:
        """The first step of a step's window."""
        return step // self.window * self.window

    def longest(self, step: int) -> int:
        """Tokens of a rollout at most: in a straight line over the first half of the steps, by window."""
        return rollout_limit(self.begins(step), self.steps, self.tokens)


class Rollouts:
    """The student's answers to the rows of one window of steps. `sample` and `stops` are those of its tokenizer.

    `plan` are the rows of every step, by their index in `rows`. A rollout ends with one of `stops`, at a loop or at its
    limit, and so says itself how it ended.
    """

    def __init__(
        self,
        policy: Policy,
        rows: Sequence[TrainingRow],
        plan: Sequence[Sequence[int]],
        max_length: int,
        stops: Collection[int],
        sample: Sample,
    ) -> None:
        self.policy, self.rows, self.plan, self.max_length = policy, rows, plan, max_length
        self.stops, self.sample = frozenset(stops), sample
        self.window: int | None = None
        self.written: dict[Place, list[int]] = {}
        self.rate = 0.0
        """Tokens a second, as they were last written."""

    def step_rows(self, model: Any, step: int) -> list[TrainingRow]:
        """The rows of a step; at the first of a window, the student writes for all of it."""
        begins = self.policy.begins(step)
        if begins != self.window:
            places = self._places(begins)
            names = [f"{at} {place}" for at, place in places]
            asked, longest = [self._asked(*place) for place in places], self.policy.longest(begins)
            written = self._answers(model, asked, names, longest)
            self.window, self.written = begins, dict(zip(places, written, strict=True))
        rows = [self.rows[index] for index in self.plan[step]]
        for place in self._drawn(step):
            rows[place] = _answered(rows[place], self.written[step, place])
        return rows

    def held_out(self, model: Any, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """The same prompts with the student's own answers, of full length and drawn alike each time."""
        names = [f"held out {index}" for index in range(len(rows))]
        answers = self._answers(model, rows, names, self.policy.tokens[1])
        return [_answered(row, tokens) for row, tokens in zip(rows, answers, strict=True)]

    def facts(self, step: int) -> dict[str, Any]:
        """What the history says of a step's rollouts: their number, mean length and limit, the shares that stopped and
        that were cut at a loop, and how many steps ago they were written."""
        places, longest = [(step, place) for place in self._drawn(step)], self.policy.longest(step)
        written = [self.written[place] for place in places]
        stopped = [tokens[-1] in self.stops for tokens in written]
        early = [len(self.written[place]) < self._limit(self._asked(*place), longest) for place in places]
        cut = [ended and not stop for ended, stop in zip(early, stopped, strict=True)]
        means = [sum(values) / len(places) if places else None for values in (map(len, written), stopped, cut)]
        return {
            "rollouts": len(places),
            **dict(zip(("rollout_tokens", "rollout_stopped", "rollout_cut"), means, strict=True)),
            "rollout_limit": longest,
            "rollout_staleness": step - self.policy.begins(step),
        }

    def state(self, step: int) -> dict[str, Any]:
        """What is left of the window of the step that comes next, as plain numbers; nothing if it is to be written."""
        begins = self.policy.begins(step)
        return {} if begins == step else {"written": [[*place, *tokens] for place, tokens in self.written.items()]}

    def load(self, state: dict[str, Any], step: int) -> None:
        if state:
            self.window = self.policy.begins(step)
            self.written = {(at, place): tokens for at, place, *tokens in state["written"]}

    def fits(self, state: dict[str, Any], step: int, vocabulary: int) -> bool:
        """Whether this is the state of the step that comes next; it may hold anything."""
        begins = self.policy.begins(step)
        if begins == step:
            return state == {}
        written, longest = {(at, place): tokens for at, place, *tokens in state["written"]}, self.policy.longest(begins)
        return list(written) == self._places(begins) and all(
            1 <= len(tokens) <= self._limit(self._asked(*place), longest)
            and all(type(one) is int and 0 <= one < vocabulary for one in tokens)
            for place, tokens in written.items()
        )

    def _places(self, begins: int) -> list[Place]:
        """Those of a window that the student answers."""
        steps = range(begins, min(begins + self.policy.window, len(self.plan)))
        return [(step, place) for step in steps for place in self._drawn(step)]

    def _drawn(self, step: int) -> list[int]:
        return self.policy.drawn(step, len(self.plan[step]))

    def _asked(self, step: int, place: int) -> TrainingRow:
        return self.rows[self.plan[step][place]]

    def _limit(self, row: TrainingRow, longest: int) -> int:
        return min(longest, self.max_length - row.prompt_length)

    def _answers(self, model: Any, rows: Sequence[TrainingRow], names: Sequence[str], longest: int) -> list[list[int]]:
        """The student's answers in the order of the rows, as `sample` shares them among ranks."""
        if not rows:
            return []
        limits = [self._limit(row, longest) for row in rows]
        answers: dict[int, list[int]] = {}
        shown = {"desc": "rollouts", "unit": "row", "leave": False, "delay": 5, "disable": ranks.rank() > 0}
        training, started = model.training, time.perf_counter()
        model.eval()
        try:
            samples = self.sample(model, [_prompt(row) for row in rows], names, max(limits), loop_ends)
            for index, tokens in tqdm(samples, total=len(rows), **shown):
                answers[index] = tokens[: limits[index]]
        finally:
            model.train(training)
            torch.clear_autocast_cache()  # holds weights as they were cast without gradients
        self.rate = sum(map(len, answers.values())) / (time.perf_counter() - started)
        return [answers[index] for index in range(len(rows))]


def _prompt(row: TrainingRow) -> list[int]:
    return row.ids[: row.prompt_length]


def _answered(row: TrainingRow, tokens: list[int]) -> TrainingRow:
    return replace(row, ids=_prompt(row) + tokens)
