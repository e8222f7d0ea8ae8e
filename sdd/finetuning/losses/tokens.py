"""What losses on the logits of target tokens share. p is the teacher's next token, q the student's."""

from torch import Tensor


class TokenLoss:
    """A loss of every target token. `targets` are the tokens that stand there."""

    needs_teacher = True

    def per_token(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        """Nats of each token, float32: (N, V), (N, V), (N,) -> (N,)."""
        raise NotImplementedError

    def total(self, logits: Tensor, teacher_logits: Tensor | None, targets: Tensor) -> Tensor:
        """Their sum: -> (). Zero for N = 0."""
        return self.per_token(logits, teacher_logits, targets).sum()


def log_probabilities(logits: Tensor, teacher_logits: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(log p, log q) of teacher and student, both softened: (N, V), (N, V) -> two of (N, V), float32."""
    assert teacher_logits is not None, "the teacher is beside the student"
    assert logits.shape == teacher_logits.shape, f"student {logits.shape}, teacher {teacher_logits.shape}"
    p, q = ((each.float() / temperature).log_softmax(-1) for each in (teacher_logits, logits))
    return p, q


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats: (N, V), (N, V) -> (N,). A token that p gives nothing counts as nothing."""
    return (log_p.exp() * (log_p - log_q)).masked_fill(log_p == -float("inf"), 0.0).sum(-1)
