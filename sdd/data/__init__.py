"""Where texts and fine-tuning rows come from. A source knows its content's digest; the digest is what recipes name."""

from dataclasses import dataclass
from inspect import signature
from typing import Any


@dataclass(frozen=True, slots=True)
class Example:
    """One fine-tuning row. `gold` is an answer in the teacher's own register, `group` a task family, where known.

    `before` are turns before the prompt, each {"role", "content"}: a system prompt of the row's own, earlier tasks and
    answers.
    """

    id: str
    prompt: str
    reference: str
    answer: str | None = None
    gold: str | None = None
    group: str | None = None
    before: tuple[dict[str, str], ...] = ()

    @property
    def turns(self) -> dict[str, Any]:
        """What files say of the turns before the prompt, if there are any."""
        return {"before": list(self.before)} if self.before else {}


def own_settings(source: Any, base: type) -> dict[str, Any]:
    """What the constructor of a subclass of `base` was told besides, where it differs from its default.

    For `spec`, so that nothing a source is told is missing in keys: it keeps each of its settings under its name.
    """
    defaults = {name: each.default for name, each in signature(type(source)).parameters.items()}
    own = {name: getattr(source, name) for name in defaults if name not in signature(base).parameters}
    return {name: value for name, value in own.items() if value != defaults[name]}
