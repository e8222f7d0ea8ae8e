"""The ways of fine-tuning, a record each: where targets come from, what is minimised, what is said and shown of it."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

SOLID = "-"
_SALTIRE = "M-1,-0.6L-0.6,-1L0,-0.4L0.6,-1L1,-0.6L0.4,0L1,0.6L0.6,1L0,0.4L-0.6,1L-1,0.6L-0.4,0Z"


@dataclass(frozen=True)
class Style:
    """How something is drawn. `marker` and `hatch` are matplotlib's, `symbol` is Vega's for the same marker, `glyph`
    stands for it in text.

    U+FE0E after a glyph asks for text where fonts have an emoji too.
    """

    colour: str
    on_dark: str
    marker: str
    symbol: str
    glyph: str
    hatch: str
    line: Any = SOLID


@dataclass(frozen=True)
class Loss:
    """A loss with a teacher beside the student: a class that is called with the teacher and these settings of
    `finetune`, which then are in the key. `id` tells losses apart there; the first that there was has none."""

    place: str
    settings: tuple[str, ...]
    id: str | None = None


@dataclass(frozen=True)
class Mode:
    """`targets`: the dataset's references, its gold answers, or the unpruned model's rewrites. `loss`: None is
    cross-entropy on them. `words` say what an exported student was tuned on."""

    name: str
    targets: Literal["reference", "gold", "rewrites"]
    words: str
    look: Style
    loss: Loss | None = None


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
        Loss("sdd.finetuning.logit_distillation:LogitDistillation", ("temperature", "ce_share")),
    ),
    Mode(
        "self_distill",
        "rewrites",
        "answers that the unpruned model itself rewrote (self-data distillation, arXiv 2410.09982)",
        Style("#D55E00", "#F5883D", "^", "triangle-up", "▲", ".."),
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


def loss_of(id: str | None) -> tuple[type, Loss]:
    """The class of a loss with a teacher, and its record, by the id that it has in a key."""
    record = next(mode.loss for mode in _ALL if mode.loss is not None and mode.loss.id == id)
    module, _, name = record.place.partition(":")
    return getattr(import_module(module), name), record
