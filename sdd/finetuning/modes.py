"""The ways of fine-tuning, a record each: where targets come from, what is minimised, what is said and shown of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdd.models.chats import CORRECTION_LEAKS, CORRECTION_TEMPLATE

SOLID = "-"
_SALTIRE = "M-1,-0.6L-0.6,-1L0,-0.4L0.6,-1L1,-0.6L0.4,0L1,0.6L0.6,1L0,0.4L-0.6,1L-1,0.6L-0.4,0Z"
_CORNER = ((-0.9, 0.9), (0.9, -0.9), (-0.9, -0.9), (-0.9, 0.9))
_SLOPE = ((-1, -0.6), (0.4, -0.6), (1, 0.6), (-0.4, 0.6), (-1, -0.6))
_BOWTIE = ((-1, -0.8), (1, 0.8), (1, -0.8), (-1, 0.8), (-1, -0.8))
_ARROW = ((0, 1), (1, 0), (0.4, 0), (0.4, -1), (-0.4, -1), (-0.4, 0), (-1, 0), (0, 1))
_HOUSE = ((0, 1), (1, 0.1), (0.7, 0.1), (0.7, -1), (-0.7, -1), (-0.7, 0.1), (-1, 0.1), (0, 1))
"""Outlines; y grows upwards in matplotlib and downwards in Vega."""


def _vega(outline: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{-y:g}" for x, y in outline) + "Z"


def _star(points: int, inner: float) -> str:
    """Vega's path of a star whose first point is on top."""
    angles = [math.pi * number / points for number in range(2 * points)]
    radii = [inner if number % 2 else 1.0 for number in range(2 * points)]
    return _vega([(round(r * math.sin(a), 2), round(r * math.cos(a), 2)) for r, a in zip(radii, angles, strict=True)])


@dataclass(frozen=True)
class Style:
    """How something is drawn. `marker` and `hatch` are matplotlib's, `symbol` is Vega's for the same marker, `glyph`
    stands for it in text.

    U+FE0E after a glyph asks for text where fonts have an emoji too.
    """

    colour: str
    on_dark: str
    marker: Any
    symbol: str
    glyph: str
    hatch: str
    line: Any = SOLID


@dataclass(frozen=True)
class Request:
    """How the teacher is asked where it is shown no reference: by `template`, phrases of which no answer may say.

    `corrects`: `{reference}` in it is what the student answered before fine-tuning.
    """

    template: str
    leak_phrases: tuple[str, ...] = ()
    corrects: bool = False


REQUESTS = {
    "reference": None,
    "alone": Request("{prompt}"),
    "draft": Request(CORRECTION_TEMPLATE, CORRECTION_LEAKS, corrects=True),
}
"""By `finetune.request`; None is the dataset's own template."""


@dataclass(frozen=True)
class Mode:
    """`targets`: the dataset's references, its gold answers, or the unpruned model's rewrites. `loss`: the weights of
    the losses of `sdd.finetuning.losses`; None is cross-entropy on the targets. `rollouts`: the student's own answers
    take the place of a share of them, as the settings of `ROLLOUTS` say. `words` say what an exported student was tuned
    on."""

    name: str
    targets: Literal["reference", "gold", "rewrites"]
    words: str
    look: Style
    loss: Mapping[str, float] | None = None
    rollouts: bool = False


ROLLOUTS = ("student_share", "rollout_tokens", "rollout_steps", "rollout_temperature")
"""Settings of `finetune` that are in the key where the student writes."""
GROWN = 0.5
"""The share of the steps after which its answers may have their full length."""


def rollout_limit(step: int, steps: int, tokens: Sequence[int]) -> int:
    """Tokens of an answer at most that the student writes at a step: in a straight line from short to full."""
    short, full = tokens
    return round(short + (full - short) * min(1.0, step / max(1.0, GROWN * steps)))


VALIDATIONS = 4
"""How often in a run the validation loss is taken."""

_ALL = (
    Mode(
        "sft",
        "reference",
        "the dataset's own reference answers",
        Style("#0072B2", "#56B4E9", "o", "circle", "●", "//"),
    ),
    Mode(
        "logit_distill",
        "reference",
        "the dataset's own reference answers, towards the teacher's probabilities of every next token",
        Style("#E69F00", "#FEBE35", "X", _SALTIRE, "✖\ufe0e", "++", (0, (8, 3))),
        {"forward_kl": 1.0},
    ),
    Mode(
        "reverse_kl",
        "reference",
        "the dataset's own reference answers, towards what the teacher says most (reverse KL)",
        Style("#8289C3", "#90FDA9", "p", _star(5, 0.81), "⬟", "|/"),
        {"reverse_kl": 1.0},
    ),
    Mode(
        "skew_kl",
        "reference",
        "the dataset's own reference answers, towards a mixture of teacher and student (skew KL, arXiv 2402.03898)",
        Style("#B70627", "#B64B1E", "d", "M0,-1L0.6,0L0,1L-0.6,0Z", "♦\ufe0e", "-/"),
        {"skew_kl": 1.0},
    ),
    Mode(
        "jsd",
        "reference",
        "the dataset's own reference answers, nearer to the teacher (Jensen-Shannon divergence, arXiv 2306.13649)",
        Style("#AF9CB3", "#D66B0D", _CORNER, _vega(_CORNER), "◣", "|\\\\"),
        {"jsd": 1.0},
    ),
    Mode(
        "taid",
        "reference",
        "the dataset's own reference answers, towards a teacher that starts near the student (TAID, arXiv 2501.16937)",
        Style("#1C2307", "#A682A5", _ARROW, _vega(_ARROW), "⬆\ufe0e", "-\\\\"),
        {"taid": 1.0},
    ),
    Mode(
        "total_variation",
        "reference",
        "the dataset's own reference answers, by the total variation distance from the teacher",
        Style("#3B05A2", "#6296E1", (4, 1, 0), _star(4, 0.5), "✦", "/."),
        {"total_variation": 1.0},
    ),
    Mode(
        "dac_kl",
        "reference",
        "the dataset's own reference answers, towards the teacher's likeliest tokens (after arXiv 2407.10068)",
        Style("#1E5F0D", "#FAE51D", _HOUSE, _vega(_HOUSE), "⌂", "|."),
        {"dac_kl": 1.0},
    ),
    Mode(
        "hidden_states",
        "reference",
        "the dataset's own reference answers, and towards the teacher's states after every block (arXiv 2310.06927)",
        Style("#400B49", "#88C080", (6, 1, 0), _star(6, 0.5), "✶", "-."),
        {"cross_entropy": 1.0, "hidden_states": 1.0},
    ),
    Mode(
        "relations",
        "reference",
        "the dataset's own reference answers, and towards the teacher's self-attention relations (arXiv 2002.10957)",
        Style("#06052E", "#C0BAC9", _BOWTIE, _vega(_BOWTIE), "⧓", "x."),
        {"cross_entropy": 1.0, "relations": 1.0},
    ),
    Mode(
        "on_policy",
        "reference",
        "answers of its own as it learned, towards the teacher's probabilities of every next token (arXiv 2306.13649)",
        Style("#8ABB7A", "#723FE4", _SLOPE, _vega(_SLOPE), "▰", "**"),
        {"jsd": 1.0},
        rollouts=True,
    ),
    Mode(
        "self_distill",
        "rewrites",
        "answers that the unpruned model itself rewrote (self-data distillation, arXiv 2410.09982)",
        Style("#D55E00", "#F5883D", "^", "triangle-up", "▲", ".."),
    ),
    Mode(
        "redi",
        "rewrites",
        "answers that the unpruned model itself rewrote, and away from the refused ones (REDI, arXiv 2505.24850)",
        Style("#1C0307", "#C5846C", (8, 1, 0), _star(8, 0.5), "✸", "o."),
        {"redi": 1.0},
    ),
    Mode(
        "gold",
        "gold",
        "reference answers in the unpruned model's own register",
        Style("#009E73", "#77E4A3", "D", "diamond", "◆", "xx"),
    ),
)
MODES = {mode.name: mode for mode in _ALL}
"""In the order in which reports compare them: the later minus the earlier."""
