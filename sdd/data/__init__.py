"""Where texts and fine-tuning rows come from. A source knows its content's digest; the digest is what recipes name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One fine-tuning row. `gold` is an answer in the teacher's own register, `group` a task family, where known."""

    id: str
    prompt: str
    reference: str
    answer: str | None = None
    gold: str | None = None
    group: str | None = None
