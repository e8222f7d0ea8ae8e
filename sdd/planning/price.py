"""What recovering a student takes: FLOPs of the student and of the unpruned model, from counts of rows and tokens.

Counted as in `sdd.analysis.costs`: 2 FLOPs a weight of every linear layer, attention over what a token sees, the head
where there are logits. Backward costs as much again for the gradients of states, and as much again for those of weights
that are trained. Left out are padding, what is computed once more on the way back (logits in chunks, activations), what
helps an engine (drafts), norms, softmax, the losses themselves, and passes over held-out rows, which recover nothing.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sdd.finetuning.losses import LOSSES
from sdd.planning.cost_model import Shape

SAMPLE = 200
"""Rows, drawn at random, whose tokens are counted."""


def sample(rows: int) -> list[int]:
    """Places of `SAMPLE` of so many rows, or of all; the same each time."""
    return sorted(random.Random("price").sample(range(rows), min(rows, SAMPLE)))


@dataclass(frozen=True)
class Price:
    """FLOPs of the student, in training and in writing, and of the unpruned model."""

    student: float = 0.0
    teacher: float = 0.0

    def __add__(self, other: "Price") -> "Price":
        return Price(self.student + other.student, self.teacher + other.teacher)

    @property
    def total(self) -> float:
        return self.student + self.teacher


@dataclass(frozen=True)
class Passed:
    """`rows` of `tokens` tokens on average, of which the last `targets` have logits."""

    rows: float
    tokens: float
    targets: float

    @property
    def seen(self) -> float:
        """Tokens that a token attends to on average, itself among them."""
        return (self.tokens + 1) / 2


def _block(shape: Shape, seen: float) -> tuple[float, float]:
    """FLOPs of a token in one block: in its matrices, and in attention over what it sees."""
    linear = 2.0 * (shape.block_parameters(shape.active) - 2 * shape.hidden)  # without the two norms
    return linear, 4 * seen * shape.heads * shape.head_dim


def forward(shape: Shape, blocks: int, passed: Passed, head: bool = True) -> float:
    """One pass without gradients."""
    per_row = passed.tokens * blocks * sum(_block(shape, passed.seen))
    return passed.rows * (per_row + (passed.targets * shape.head_flops if head else 0.0))


def written(shape: Shape, blocks: int, rows: float, prompt: float, new: float) -> float:
    """Answers of `new` tokens to prompts of `prompt` tokens, keys and values kept; the last token is not passed on."""
    return forward(shape, blocks, Passed(rows, prompt + max(new - 1, 0), new))


def trained(shape: Shape, blocks: int, passed: Passed, adapter: int, reach: int | None = None) -> float:
    """A pass forward and back of LoRA with `adapter` weights in the last `reach` blocks (None: all).

    Below the lowest of these nothing is passed back, nor from its queries, keys and values.
    """
    linear, attention = _block(shape, passed.seen)
    entry = 2 * sum(a * b for name, (a, b) in shape.linear.items() if name[0] in "qkv")
    back = (blocks if reach is None else reach) * (linear + 2 * attention) - entry
    per_token = blocks * (linear + attention) + back + 6 * adapter
    return passed.rows * (passed.tokens * per_token + 2 * passed.targets * shape.head_flops)


def trained_whole(shape: Shape, blocks: int, passed: Passed) -> float:
    """The same where every weight is trained."""
    return 3 * forward(shape, blocks, passed)


def trained_head(shape: Shape, blocks: int, passed: Passed) -> float:
    """The same where the head and the norms are trained: gradients of states pass through all blocks, frozen ones."""
    linear, attention = _block(shape, passed.seen)
    per_token = blocks * (2 * linear + 3 * attention)
    return passed.rows * (passed.tokens * per_token + 3 * passed.targets * shape.head_flops)


@dataclass(frozen=True)
class Trained:
    """What is trained: by `adapter.method`; LoRA's `weights` are in the last `reach` blocks (None: all)."""

    method: str = "lora"
    weights: int = 0
    reach: int | None = None

    def flops(self, shape: Shape, passed: Passed) -> float:
        """Of passes forward and back."""
        if self.method == "full":
            return trained_whole(shape, shape.blocks, passed)
        if self.method == "head_and_norms":
            return trained_head(shape, shape.blocks, passed)
        return trained(shape, shape.blocks, passed, self.weights, self.reach)


@dataclass(frozen=True)
class Rewritten:
    """Of a row on average: tries that are kept, tokens that the teacher is shown and writes in each, and tokens that
    the pruned model wrote before."""

    tries: float
    asked: float
    new: float
    drafted: float = 0.0


@dataclass(frozen=True)
class Recovery:
    """One recovery, as means over its rows: what is trained on, what runs beside it and what it stands on.

    `rows` counts every epoch's; `own` of them have answers of `own_tokens` that the student wrote, in place of a
    `target`. A share `refused` has a rejected answer too, of `rejected` tokens. `beside`: what the teacher makes of
    every row. `damaged`, `taught` and `used` are rows whose damage is measured, whose logits are kept, and which the
    teacher has `rewritten`; `weighed`: it has said how likely each of their tries is, too.
    """

    student: Shape
    unpruned: Shape
    teacher: Shape
    trained: Trained
    rows: float
    prompt: float
    target: float
    own: float = 0.0
    own_tokens: float = 0.0
    refused: float = 0.0
    rejected: float = 0.0
    beside: Literal["logits", "states"] | None = None
    damaged: float = 0.0
    taught: float = 0.0
    used: float = 0.0
    rewritten: Rewritten | None = None
    weighed: bool = False

    def price(self) -> Price:
        target = self.target + self.own * (self.own_tokens - self.target) / max(1, self.rows)
        passed = Passed(self.rows, self.prompt + target, target)
        total = Price(self.trained.flops(self.student, passed))
        if self.refused:
            refused = Passed(self.refused * self.rows, self.prompt + self.rejected, self.rejected)
            total += Price(self.trained.flops(self.student, refused))
        if self.beside:
            total += Price(teacher=_passes(self.teacher, passed, self.beside == "logits"))
        total += Price(self._written(self.own, self.own_tokens))
        damaged, taught = (Passed(rows, self.prompt + self.target, self.target) for rows in (self.damaged, self.taught))
        total += Price(_passes(self.student, damaged), _passes(self.unpruned, damaged) + _passes(self.teacher, taught))
        if (row := self.rewritten) is None:
            return total
        tries = row.tries * self.used
        teacher = written(self.teacher, self.teacher.blocks, tries, row.asked, row.new)
        if self.weighed:
            teacher += _passes(self.teacher, Passed(tries, self.prompt + row.new, row.new))
        return total + Price(self._written(self.used, row.drafted), teacher)

    def _written(self, rows: float, new: float) -> float:
        """By the student, after a prompt."""
        return written(self.student, self.student.blocks, rows, self.prompt, new) if new else 0.0


def beside(losses: Iterable[str]) -> Literal["logits", "states"]:
    """What the teacher makes for these losses, of which one needs it."""
    is_soft = any(LOSSES[name].needs == "teacher logits" for name in losses if name in LOSSES)
    return "logits" if is_soft else "states"


def _passes(shape: Shape, passed: Passed, head: bool = True) -> float:
    return forward(shape, shape.blocks, passed, head)
