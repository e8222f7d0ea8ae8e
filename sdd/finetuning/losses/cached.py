"""The teacher's next-token probabilities from files, in place of the teacher: some tokens of each distribution.

`top_k`: the k likeliest tokens, and the mass of all others as one more class (FIRST, arXiv 2408.12168). A loss is taken
between both distributions over these k + 1 classes: exact for k = vocabulary, and a bound from below for a divergence.
The k tokens alone, made to sum to 1, would teach the student too sharp a distribution.

`sampled`: k tokens drawn from the distribution (arXiv 2503.16870), from k equal parts of its mass, one of each. The
gradient of -mean log q(drawn) is that of forward KL in expectation; with the distribution's entropy, so is its value.

Rows lie in shards of `ROWS`, safetensors, which are read where they are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdd.errors import UserError
from sdd.finetuning.losses.tokens import TokenLoss
from sdd.finetuning.module import TrainingRow
from sdd.untrusted import check_inside

ROWS = 256
MOST = 32.0
"""Nats: less likely tokens count as this unlikely."""
FORMS: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.float32}


def shard(number: int) -> str:
    return f"{number:05d}.safetensors"


# ---- what is kept -----------------------------------------------------------------------------------------------


def likeliest(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(tokens, -log p): (N, V) -> (N, k), (N, k + 1) with the other tokens' as one class last, or (N, V) for k = V."""
    log_p = (logits.float() / temperature).log_softmax(-1)
    kept, tokens = log_p.topk(k, dim=-1)
    return tokens, -kept if k == log_p.shape[-1] else -_with_rest(log_p, tokens)


def drawn(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(tokens, entropy in nats): (N, V) and numbers in [0, 1) of shape (N, k) -> (N, k), (N,)."""
    log_p = (logits.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    below, k = p.cumsum(-1), uniform.shape[-1]
    places = (torch.arange(k, device=uniform.device) + uniform) / k * below[:, -1:]
    tokens = torch.searchsorted(below, places, right=True).clamp_max(p.shape[-1] - 1)
    return tokens, -torch.special.xlogy(p, p).sum(-1)


def coded(nats: Tensor, bits: int) -> Any:
    """Finest where a token is likely: 8 bits are within 6% of a probability of 0.001, 16 bits within 0.03%."""
    values = nats.clamp(0, MOST).cpu().numpy()
    return values if bits == 32 else np.rint(np.sqrt(values / MOST) * (2**bits - 1)).astype(FORMS[bits])


def decoded(codes: Any) -> Tensor:
    """Log probabilities that sum to 1."""
    values = torch.from_numpy(codes.astype(np.float32))
    if codes.dtype != np.float32:
        values = (values / float(np.iinfo(codes.dtype).max)).square() * MOST
    return (-values).log_softmax(-1)


# ---- losses -----------------------------------------------------------------------------------------------------


def from_likeliest(term: TokenLoss, logits: Tensor, targets: Tensor, tokens: Tensor, log_p: Tensor) -> Tensor:
    """A loss of every token over the classes kept: (N, V), (N,), (N, k), (N, k + 1) -> (N,)."""
    t = float(getattr(term, "temperature", 1.0))
    log_q = (logits.float() / t).log_softmax(-1)
    is_whole = log_p.shape[-1] == tokens.shape[-1]
    shown = log_q.gather(-1, tokens) if is_whole else _with_rest(log_q, tokens)
    found = tokens == targets[:, None]
    classes = found.long().argmax(-1).where(found.any(-1), tokens.shape[-1])
    return term.per_token(t * shown, t * log_p, classes)


def from_drawn(temperature: float, logits: Tensor, tokens: Tensor, entropy: Tensor) -> Tensor:
    """Forward KL of every token, an estimate without bias: (N, V), (N, k), (N,) -> (N,)."""
    log_q = (logits.float() / temperature).log_softmax(-1)
    return (-log_q.gather(-1, tokens).mean(-1) - entropy) * temperature**2


def _with_rest(logs: Tensor, tokens: Tensor) -> Tensor:
    """Log probabilities of the tokens, and of all others together: (N, V), (N, k) -> (N, k + 1)."""
    rest = logs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(-1, tokens), rest], -1)


# ---- files ------------------------------------------------------------------------------------------------------


class Cache:
    """What is kept of every row, in the order of the targets; a row that was too long has no token."""

    def __init__(self, folder: Path) -> None:
        self.shards: list[Any] = []
        self.starts: list[Any] = []
        for path in sorted(folder.glob("*.safetensors")):
            check_inside(path, folder, f"{path}")
            try:
                opened = safe_open(path, framework="np")
                self.starts.append(opened.get_tensor("starts"))
            except SafetensorError as error:
                raise UserError(f"{path}: damaged safetensors file ({error}); build its artifact again") from None
            self.shards.append(opened)
        if not self.shards:
            raise UserError(f"{folder} holds nothing of a teacher; build its artifact again")
        self.is_drawn = "entropy" in self.shards[0].keys()  # noqa: SIM118 (an open file, no dict)

    def count(self, place: int) -> int:
        """How many target tokens of a row are there."""
        number, at = divmod(place, ROWS)
        return int(self.starts[number][at + 1] - self.starts[number][at])

    def of(self, rows: Sequence[TrainingRow], device: Any = "cpu") -> list[Tensor]:
        """Tokens, and log probabilities or entropies, of the rows' targets, one behind the other."""
        names = ("tokens", "entropy" if self.is_drawn else "nats")
        parts: list[list[Any]] = [[self._slice(row, name) for row in rows] for name in names]
        tokens, other = (np.concatenate(part) for part in parts)
        beside = torch.from_numpy(other) if self.is_drawn else decoded(other)
        return [torch.from_numpy(tokens.astype(np.int64)).to(device), beside.to(device)]

    def _slice(self, row: TrainingRow, name: str) -> Any:
        assert row.place is not None, "a row without a place in the cache"
        number, at = divmod(row.place, ROWS)
        first, last = (int(each) for each in self.starts[number][at : at + 2])
        return self.shards[number].get_slice(name)[first:last]

    def losses(self, term: TokenLoss, logits: Tensor, targets: Tensor, *kept: Tensor) -> Tensor:
        """(N,), as `per_token` with the teacher's logits."""
        if self.is_drawn:
            return from_drawn(float(getattr(term, "temperature", 1.0)), logits, *kept)
        return from_likeliest(term, logits, targets, *kept)
