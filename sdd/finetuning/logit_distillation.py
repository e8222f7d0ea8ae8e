"""Logit distillation: the student learns the teacher's probabilities at every target token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdd.finetuning.module import TrainingRow, labelled, target_states
from sdd.forward import chunks
from sdd.forward.losses import forward_kl_sum, summed_in_chunks, target_loss_sum
from sdd.models.checkpoints import head_logits


@dataclass(frozen=True)
class LogitDistillation:
    """The loss of logit distillation, in place of `loss_sum`: ce_share * CE + (1 - ce_share) * KL(teacher || student).

    Taken at every target token. The frozen teacher reads the same rows in the same step, in its own dtype, so that
    nothing is cached. It is no part of the module in training, of its optimiser or of its checkpoints. Beside the
    student there are the teacher's weights, its states of one micro-batch, and both models' logits of one chunk.
    """

    teacher: Any
    temperature: float = 1.0
    ce_share: float = 0.0

    def __call__(self, model: Any, rows: Sequence[TrainingRow], device: Any = "cpu") -> tuple[Tensor, int]:
        ids, mask, labels = labelled(rows, device)
        at = labels[:, 1:] != -100
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            teacher_states = target_states(self.teacher, ids, mask, at)

        def loss(hidden: Tensor, teacher_states: Tensor, targets: Tensor) -> Tensor:
            logits = head_logits(model, hidden)
            with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
                teacher_logits = head_logits(self.teacher, teacher_states)
            kl = (1 - self.ce_share) * forward_kl_sum(logits, teacher_logits, self.temperature)
            return kl + self.ce_share * target_loss_sum(logits, targets) if self.ce_share else kl

        tensors = target_states(model, ids, mask, at), teacher_states, labels[:, 1:][at]
        return summed_in_chunks(loss, *tensors, chunk=chunks.CHUNK_TOKENS), int(at.sum())
