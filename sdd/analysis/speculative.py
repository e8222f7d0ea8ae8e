"""Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192): a small model drafts, a large one verifies.

A pass: the student drafts k tokens, the teacher looks at all of them at once, keeps those before the first that it
would not have said, and adds one token of its own. Under greedy decoding the output is the teacher's, so that whatever
the student drafts, it always stands at a prefix of that output, and a draft is accepted as long as it repeats it.
Which tokens the student repeats is therefore known from one teacher-forced pass over the teacher's own output, for
every k at once, and no number here depends on a machine but the timings.

    acceptance rate        share of the output's tokens that the student says too, the teacher's tokens before it given
    mean accepted length   drafted tokens accepted a pass
    block efficiency       tokens put out a pass of the teacher: accepted ones and its own

Predicted speed-up, c being the time of a student's step and v that of a verification, both in teacher's steps:
(1 - a^(k+1)) / ((1 - a)(k c + 1)) where every token is accepted with probability a independently (Theorem 3.8), and
block efficiency / (k c + v) with the passes as they are counted.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdd.forward.teacher_forcing import Row, per_token


def greedy_matches(student: Any, rows: Sequence[Row], batch_size: int) -> list[list[bool]]:
    """For every row, whether the student's most likely token is the answer's, at each token of the answer."""
    matches = per_token(lambda tokens, logits: logits.argmax(-1) == tokens, rows, batch_size, student)
    return [[bool(value) for value in row] for row in matches]


def overlap(p_logits: Any, q_logits: Any, temperature: float) -> Any:
    """Probability that a token drafted from q is accepted by p: sum of min(p, q); (N, V), (N, V) -> (N,) in [0, 1].

    Corollary 3.6 of arXiv 2211.17192; 1 minus the total variation distance.
    """
    import torch

    p, q = (torch.softmax(logits.float() / temperature, -1) for logits in (p_logits, q_logits))
    return torch.minimum(p, q).sum(-1)


def sampling_acceptance(
    teacher: Any, student: Any, rows: Sequence[Row], batch_size: int, temperature: float
) -> list[list[float]]:
    """For every row and token of its answer, the probability that a drafted token is accepted when sampling."""
    return per_token(lambda tokens, p, q: overlap(p, q, temperature), rows, batch_size, teacher, student)


@dataclass(frozen=True)
class Passes:
    """What greedy speculative decoding of one output, or of several, takes: all are counts."""

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(
            self.tokens + other.tokens,
            self.passes + other.passes,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )

    @property
    def block_efficiency(self) -> float:
        return self.tokens / self.passes

    @property
    def mean_accepted_length(self) -> float:
        return self.accepted / self.passes

    @property
    def accepted_share(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


def simulate(matches: Sequence[bool], draft_length: int, stopped: bool) -> Passes:
    """The passes in which an output with these matches is put out, at most `draft_length` drafted a pass.

    `stopped` says that the output's last token ended it, which may itself be drafted; an output cut at the limit of new
    tokens ends in a token of the teacher's. `drafted` counts `draft_length` tokens a pass and fewer at the end; a
    student that ends its draft early, behind a token that is refused anyway, is counted as if it had gone on.
    """
    tokens, at, passes, drafted, accepted = len(matches), 0, 0, 0, 0
    while at < tokens:
        left = tokens - at
        length = min(draft_length, left if stopped else left - 1)
        kept = next((place for place in range(length) if not matches[at + place]), length)
        passes, drafted, accepted = passes + 1, drafted + length, accepted + kept
        at += min(kept + 1, left)
    return Passes(tokens, passes, drafted, accepted)


def expected_block_efficiency(acceptance: float, draft_length: int) -> float:
    """Tokens a pass if each is accepted with probability `acceptance` independently: (1 - a^(k+1)) / (1 - a)."""
    return float(sum(acceptance**power for power in range(draft_length + 1)))


def predicted_speedup(
    block_efficiency: float, draft_length: int, step_ratio: float, verification: float = 1.0
) -> float:
    """How many times faster than plain decoding; a student's step and a verification are given in teacher's steps."""
    return block_efficiency / (draft_length * step_ratio + verification)


@dataclass(frozen=True)
class Generated:
    """One answer: its tokens, its seconds, and how often the teacher was run for it."""

    tokens: list[int]
    seconds: float
    passes: int


def generate(
    teacher: Any,
    prompt: list[int],
    stops: list[int],
    max_new_tokens: int,
    draft: tuple[Any, int] | None = None,
    sampled: tuple[float, int] | None = None,
) -> Generated:
    """Answer one prompt by transformers' own generation, plain or assisted by `draft` (a student, draft length).

    Greedy, or `sampled` at (temperature, seed). The draft length is held constant, and the student drafts however
    unsure it is.
    """
    import torch

    assisted: dict[str, Any] = {}
    if draft is not None:
        student, length = draft
        student.generation_config.num_assistant_tokens = length
        student.generation_config.num_assistant_tokens_schedule = "constant"
        student.generation_config.assistant_confidence_threshold = 0.0
        assisted["assistant_model"] = student
    ids = torch.tensor([prompt], device=teacher.device)
    passes = [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    handle = teacher.register_forward_pre_hook(count)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None}
    if sampled is not None:
        sampling = {"do_sample": True, "temperature": sampled[0], "top_k": 0}
        torch.manual_seed(sampled[1])
    try:
        _wait(teacher)
        started = time.perf_counter()
        with torch.no_grad():
            output = teacher.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                top_p=None,
                **sampling,
                pad_token_id=stops[0],
                eos_token_id=stops,
                **assisted,
            )
        _wait(teacher)
        seconds = time.perf_counter() - started
    finally:
        handle.remove()
    return Generated(output[0, len(prompt) :].tolist(), seconds, passes[0])


def _wait(model: Any) -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize()
