"""Losses that add up, on the same rows, the frozen teacher beside the student.

The teacher reads the same rows in the same step, in its own dtype. It is no part of the module in training, of its
optimiser or of its checkpoints. Beside the student there are the teacher's weights, its states of one micro-batch, and
both models' logits of one chunk of target tokens; or, in place of all of that, what is kept of its logits in files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdd.finetuning.losses import LOSSES
from sdd.finetuning.losses.cached import Cache
from sdd.finetuning.losses.redi import REDI, shares_of
from sdd.finetuning.losses.taid import TAID
from sdd.finetuning.losses.tokens import TokenLoss
from sdd.finetuning.module import TrainingRow, labelled, target_states, target_tokens
from sdd.forward import chunks
from sdd.forward.losses import summed_in_chunks
from sdd.forward.watching import watching
from sdd.models.checkpoints import head_logits


def built(
    weights: Mapping[str, float],
    settings: Mapping[str, Any],
    teacher: Any = None,
    kept: Sequence[int] = (),
    cache: Cache | None = None,
) -> "Weighted":
    """The losses of those names, each with its own of the settings; those that are not given have their defaults."""
    terms = []
    for name, weight in weights.items():
        record = LOSSES[name]
        terms.append((weight, record.cls()(**{key: settings[key] for key in record.settings if key in settings})))
    return Weighted(terms, teacher, kept, cache)


@dataclass
class Weighted:
    """A loss in place of `loss_sum`. `kept` is the teacher's block that each of the student's was; `cache` stands in
    for a teacher that is not there.

    A sum over target tokens; with a loss of whole rows among the terms, a sum over rows of means over their tokens, and
    what it is divided by is `count` of the global batch.
    """

    terms: Sequence[tuple[float, Any]]
    teacher: Any = None
    kept: Sequence[int] = ()
    cache: Cache | None = None

    @property
    def by_row(self) -> bool:
        return any(isinstance(term, REDI) for _, term in self.terms)

    @property
    def needs_whole_passes(self) -> bool:
        """Whether a pass that begins above frozen blocks, or on other rows than the step's, would not do."""
        return not all(isinstance(term, TokenLoss) for _, term in self.terms) or self.by_row

    def count(self, rows: Sequence[TrainingRow]) -> int:
        return len(rows) if self.by_row else target_tokens(rows)

    def __call__(self, model: Any, rows: Sequence[TrainingRow], device: Any = "cpu") -> tuple[Tensor, int]:
        ids, mask, labels = labelled(rows, device)
        at = labels[:, 1:] != -100
        others = [(weight, term) for weight, term in self.terms if not isinstance(term, TokenLoss)]
        taught: list[dict[str, Tensor]] = []
        teacher_states = None
        if self.teacher is not None:
            watched = [term.watched(self.teacher, self.kept) for _, term in others]
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=False), watching(*watched) as taught:
                teacher_states = target_states(self.teacher, ids, mask, at)
        with watching(*(term.watched(model, range(len(self.kept))) for _, term in others)) as own:
            student_states = target_states(model, ids, mask, at)
        shares = shares_of(at) if self.by_row else None
        shown = [] if teacher_states is None else [teacher_states]
        if self.cache is not None:
            shown = self.cache.of(rows, device)
        total = self._of_tokens(model, student_states, shown, labels[:, 1:][at], shares)
        for (weight, term), student_table, teacher_table in zip(others, own, taught, strict=True):
            losses = term.per_token(student_table, teacher_table, mask, at)
            total = total + weight * (losses if shares is None else losses * shares).sum()
        for weight, term in self.terms:
            if isinstance(term, REDI):
                total = total + weight * term.rejected(model, rows, device)
        return total, self.count(rows)

    def _of_tokens(
        self, model: Any, states: Tensor, shown: Sequence[Tensor], targets: Tensor, shares: Tensor | None
    ) -> Tensor:
        """The terms on logits, made in chunks; `shown` are the teacher's states, or what is kept of its logits."""
        terms = [(weight, term) for weight, term in self.terms if isinstance(term, TokenLoss)]
        if not terms:
            return states.sum() * 0.0
        with_teacher = self.cache is None and any(term.needs_teacher for _, term in terms)

        def loss(hidden: Tensor, targets: Tensor, *beside: Tensor) -> Tensor:
            logits, teacher_logits = head_logits(model, hidden), None
            if with_teacher:
                with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
                    teacher_logits = head_logits(self.teacher, beside[0])
            sums = []
            for weight, term in terms:
                if self.cache is not None and term.needs_teacher:
                    losses = self.cache.losses(term, logits, targets, *beside[:2])
                elif shares is None:
                    sums.append(weight * term.total(logits, teacher_logits, targets))
                    continue
                else:
                    losses = term.per_token(logits, teacher_logits, targets)
                sums.append(weight * (losses if shares is None else losses * beside[-1]).sum())
            return sum(sums[1:], sums[0])

        beside = [*shown, *([] if shares is None else [shares])]
        return summed_in_chunks(loss, states, targets, *beside, chunk=chunks.CHUNK_TOKENS)

    # ---- what a loss remembers from step to step

    def stepped(self, loss: float, done: float) -> None:
        for term in self._remembering():
            term.stepped(loss, done)

    def state(self) -> dict[str, float]:
        """Plain numbers by name; nothing of a loss that remembers nothing."""
        return {name: value for term in self._remembering() for name, value in term.state().items()}

    def restore(self, state: dict[str, float]) -> None:
        for term in self._remembering():
            term.restore(state)

    def _remembering(self) -> list[TAID]:
        return [term for _, term in self.terms if isinstance(term, TAID)]
