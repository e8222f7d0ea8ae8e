"""What recovering a student takes: FLOPs of the student and of the unpruned model, from counts of rows and tokens.

Counted as in `sdd.analysis.costs`: 2 FLOPs a weight of every linear layer, attention over what a token sees, the head
where there are logits. Backward costs as much again for the gradients of states, and as much again for those of weights
that are trained. Left out are padding, what is computed once more on the way back (logits in chunks, activations), what
helps an engine (drafts), norms, softmax, the losses themselves, and passes over held-out rows, which recover nothing.
"""

from dataclasses import dataclass

from sdd.planning.cost_model import Shape


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
