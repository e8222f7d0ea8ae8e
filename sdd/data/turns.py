"""A conversation as rows have it, taken apart: the last answer, the task it answers, and the turns before.

Turns are {"role", "content"} or {"from", "value"}, contents are texts or lists of parts with one each. Knows nothing of
chat templates.
"""

from typing import Any

from sdd.errors import UserError
from sdd.untrusted import printable

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}

Turns = tuple[dict[str, str], ...]


def taken_apart(messages: Any, place: str) -> tuple[Turns, str, str]:
    """(turns before the task, task, last answer); what follows the last answer is left out."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{place} is no list of turns")
    turns = [_turn(message, f"{place}: turn {number}") for number, message in enumerate(messages, 1)]
    last = max((at for at, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
    if last is None:
        raise UserError(f"{place} has no turn of the assistant, which would be the reference")
    if last == 0 or turns[last - 1]["role"] != "user":
        raise UserError(f"{place}: no turn of the user comes before the last of the assistant")
    if any(turn["role"] == "system" for turn in turns[1:last]):
        raise UserError(f"{place}: the system's turn is not the first")
    return tuple(turns[: last - 1]), turns[last - 1]["content"], turns[last]["content"]


def _turn(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UserError(f'{place} is not {{"role": ..., "content": ...}}')
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        words = [text for text in texts if isinstance(text, str)]
        content = "".join(words) if len(words) == len(content) else None
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{place} has the role {printable(str(role)[:40])}; known are {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise UserError(f"{place} has no text")
    return {"role": ROLES[role], "content": content}
