"""TAID, temporally adaptive interpolated distillation (arXiv 2501.16937): the teacher comes nearer as training goes.

The target is softmax((1 - t) sg(student's logits) + t teacher's logits), the loss KL(target || q), times T^2. t rises
from `taid_start` to 1: never below the straight line, and faster while the loss falls,
m <- 0.99 m + 0.01 (L' - L) / L' with L' the last step's loss, t <- max(line, t + 5e-4 sigmoid(m) (1 - t)).
L is the step's whole loss, which is TAID's own where no other is beside it.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from sdd.finetuning.losses.tokens import TokenLoss, divergence, log_probabilities

MOMENTUM, PACE, LEAST = 0.99, 5e-4, 1e-15


@dataclass
class TAID(TokenLoss):
    """`t`, `momentum` and `previous`, the last step's loss, are the state; 0 before the first step has one."""

    temperature: float = 1.0
    taid_start: float = 0.4
    t: float | None = None
    momentum: float = 0.0
    previous: float = 0.0

    def __post_init__(self) -> None:
        self.t = self.taid_start if self.t is None else self.t

    def per_token(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        assert teacher_logits is not None and self.t is not None, "the teacher is beside the student"
        target = (1 - self.t) * logits.detach().float() + self.t * teacher_logits.float()
        p, q = log_probabilities(logits, target, self.temperature)
        return divergence(p, q) * self.temperature**2

    def stepped(self, loss: float, done: float) -> None:
        """After a step with that mean loss; `done` is the share of all steps that are behind."""
        assert self.t is not None
        change = (self.previous - loss) / (self.previous + LEAST) if self.previous else 0.0
        self.momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * change
        pace = PACE / (1 + math.exp(-self.momentum)) * (1 - self.t)
        line = self.taid_start + (1 - self.taid_start) * done
        self.t, self.previous = min(1.0, max(line, self.t + pace)), loss

    def state(self) -> dict[str, float]:
        assert self.t is not None
        return {"t": self.t, "momentum": self.momentum, "previous": self.previous}

    def restore(self, state: dict[str, float]) -> None:
        self.t, self.momentum, self.previous = (float(state[name]) for name in ("t", "momentum", "previous"))
