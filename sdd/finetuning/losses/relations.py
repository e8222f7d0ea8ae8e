"""Self-attention relations (MiniLM, arXiv 2002.10957; of queries and keys too as in MiniLMv2, arXiv 2012.15828).

In the last block, for each of queries, keys and values and each of its heads, a token's relation to the tokens up to it
is softmax(x x' / sqrt(d)); the loss is KL(teacher's || student's), the mean over heads and over the three. Of the
teacher it is the block that the student's last was.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdd.finetuning.losses.tokens import divergence
from sdd.models.checkpoints import blocks

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass
class Relations:
    head_dim: int = 0

    def watched(self, model: Any, places: Sequence[int]) -> dict[str, Any]:
        config = model.config
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        named = dict(blocks(model)[places[-1]].named_modules())
        return {end: next(module for name, module in named.items() if name.endswith(end)) for end in PROJECTIONS}

    def per_token(self, own: Mapping[str, Tensor], taught: Mapping[str, Tensor], mask: Tensor, at: Tensor) -> Tensor:
        losses = [relation_kl(state, taught[name], mask, self.head_dim)[:, :-1][at] for name, state in own.items()]
        return torch.stack(losses).mean(0)


def relation_kl(student: Tensor, teacher: Tensor, mask: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads * d) of both, (B, T) -> (B, T), nats: the divergence at every token, the mean over heads."""
    log_q, log_p = (relations(each, mask, head_dim) for each in (student, teacher))
    unseen = log_p == -torch.inf
    return divergence(log_p, log_q.masked_fill(unseen, 0.0)).mean(1)


def relations(states: Tensor, mask: Tensor, head_dim: int) -> Tensor:
    """Log of each token's relation to those up to it: (B, T, heads * d) -> (B, heads, T, T); -inf for later ones."""
    rows, length, _ = states.shape
    heads = states.float().view(rows, length, -1, head_dim).transpose(1, 2)
    scores = heads @ heads.transpose(-1, -2) / math.sqrt(head_dim)
    seen = torch.ones(length, length, dtype=torch.bool, device=states.device).tril() & mask.bool()[:, None, None, :]
    seen = seen | torch.eye(
        length, dtype=torch.bool, device=states.device
    )  # pads see themselves, and no token sees them
    return scores.masked_fill(~seen, -torch.inf).log_softmax(-1)
