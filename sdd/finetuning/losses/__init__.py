"""What is minimised in fine-tuning: every loss a record here and a file of its own; no library is loaded.

Losses add up, each with a weight: `finetune.loss={cross_entropy: 0.5, reverse_kl: 0.5}`. A mode has a loss of its own,
which is taken where the config names none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Needs = Literal["nothing", "teacher logits", "teacher states", "rejected rows"]


@dataclass(frozen=True)
class Loss:
    """`settings` are those of `finetune` that its class, at `place`, takes. The name is in keys, and for good."""

    name: str
    place: str
    needs: Needs
    words: str
    settings: tuple[str, ...] = ()

    @property
    def needs_teacher(self) -> bool:
        return self.needs.startswith("teacher")

    def cls(self) -> type:
        module, _, name = self.place.partition(":")
        kind: type = getattr(import_module(f"sdd.finetuning.losses.{module}"), name)
        return kind


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", "cross_entropy:CrossEntropy", "nothing", "cross-entropy on the targets"),
        Loss(
            "forward_kl",
            "forward_kl:ForwardKL",
            "teacher logits",
            "KL(teacher || student), which covers all that the teacher may say",
            ("temperature",),
        ),
        Loss(
            "reverse_kl",
            "reverse_kl:ReverseKL",
            "teacher logits",
            "KL(student || teacher), which keeps to what the teacher says most",
            ("temperature",),
        ),
        Loss(
            "skew_kl",
            "skew_kl:SkewKL",
            "teacher logits",
            "KL from the teacher to a mixture of both",
            ("temperature", "skew"),
        ),
        Loss(
            "jsd",
            "jsd:JSD",
            "teacher logits",
            "generalised Jensen-Shannon divergence, between forward and reverse KL",
            ("temperature", "jsd_beta"),
        ),
        Loss(
            "taid",
            "taid:TAID",
            "teacher logits",
            "KL from a teacher that starts near the student and becomes itself",
            ("temperature", "taid_start"),
        ),
        Loss(
            "total_variation",
            "total_variation:TotalVariation",
            "teacher logits",
            "total variation distance: one minus how often a draft is accepted",
        ),
        Loss(
            "dac_kl",
            "dac_kl:ClippedKL",
            "teacher logits",
            "KL from the teacher's likeliest tokens alone",
            ("temperature", "clip_mass"),
        ),
        Loss(
            "hidden_states",
            "hidden_states:HiddenStates",
            "teacher states",
            "squared error of every block's states, over the teacher's own square",
        ),
        Loss(
            "relations",
            "relations:Relations",
            "teacher states",
            "KL between how tokens relate to each other in the last block's attention",
        ),
        Loss(
            "redi",
            "redi:REDI",
            "rejected rows",
            "away from rewrites that the selection refused, towards the targets",
            ("rejected_weight",),
        ),
    )
}
SETTINGS = tuple(dict.fromkeys(name for loss in LOSSES.values() for name in loss.settings))
"""Settings of `finetune` that belong to losses."""

PLAIN = {"cross_entropy": 1.0}


def weights_of(own: Mapping[str, float] | None, ce_share: float, asked: Any) -> dict[str, float]:
    """The weight of each loss: those that the config asks for, a name or weights by name; else the mode's `own`.

    Of an own loss that is one and has a teacher, cross-entropy takes `ce_share`.
    """
    if asked is not None:
        return {asked: 1.0} if isinstance(asked, str) else {name: float(weight) for name, weight in asked.items()}
    weights = dict(own or PLAIN)
    if ce_share and len(weights) == 1 and LOSSES[name := next(iter(weights))].needs_teacher:
        return {name: 1 - ce_share, "cross_entropy": ce_share}
    return weights


def bytes_a_token(kind: str, k: int, bits: int, vocabulary: int) -> float:
    """On disk, of what is kept of the teacher's distribution at a target token (see `cached`)."""
    ids = k * (2 if vocabulary <= 1 << 16 else 4)
    return ids + (4 if kind == "sampled" else min(k + 1, vocabulary) * bits / 8)


def needed(weights: Mapping[str, float]) -> set[Needs]:
    """What the losses need beside the targets."""
    return {LOSSES[name].needs for name in weights} - {"nothing"}
