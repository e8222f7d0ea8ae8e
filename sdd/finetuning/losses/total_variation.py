"""Total variation distance, 1/2 sum |p - q| in [0, 1]: one minus the chance that a draft's token is accepted.

DistillSpec (arXiv 2310.08461) takes it for drafts. TVD++ (arXiv 2403.00858) normalises the rewards of a policy gradient
of it; summed over the whole vocabulary, as here, a baseline of the rewards changes no gradient. Their deviation, by
which they are divided there, is left out: it is a rate of a token's own.
"""

from dataclasses import dataclass

from torch import Tensor

from sdd.finetuning.losses.tokens import TokenLoss, log_probabilities


@dataclass
class TotalVariation(TokenLoss):
    def per_token(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        p, q = log_probabilities(logits, teacher_logits)
        return 0.5 * (p.exp() - q.exp()).abs().sum(-1)
