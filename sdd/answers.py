"""Final answers: where they stand in a text, and when two of them are equal.

Rules: `final` wants the answer on the last line in one of the known forms ("The answer is 7.", "#### 7", "ans: 7");
`anywhere` takes the last such form anywhere in the text; `number` takes the last number; `none` extracts nothing.
Knows nothing of models or datasets.
"""

import re
from decimal import Decimal, InvalidOperation

from sdd.errors import UserError

RULES = ("final", "anywhere", "number", "none")

_FORM = re.compile(
    r"(?:the answer is:?[ ]*(?P<said>.+?)\.?|####[ ]*(?P<marked>.+?)|\bans:[ ]*(?P<short>.+?))[ ]*$", re.I
)
_NUMBER = re.compile(r"[-−]?[$€£]?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)")
_NUMERIC = re.compile(
    r"^(?P<sign>[-−]?)[$€£]?(?P<value>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+)(?:\s*[A-Za-z%°€£$][^\d]*)?$"
)


def _stated(line: str) -> str | None:
    match = _FORM.search(line.strip())
    if match is None:
        return None
    return next(value for value in match.groups() if value is not None).strip()


def extract(text: str, rule: str) -> str | None:
    """The final answer in `text`, as written; None where there is none."""
    if rule not in RULES:
        raise UserError(f"dataset.answer_rule={rule} is unknown; choose one of {', '.join(RULES)}")
    lines = [line for line in text.strip().split("\n") if line.strip()]
    if rule == "none" or not lines:
        return None
    if rule == "number":
        numbers: list[str] = _NUMBER.findall(text)
        return numbers[-1].rstrip(",") if numbers else None
    if rule == "final":
        return _stated(lines[-1])
    return next((found for line in reversed(lines) if (found := _stated(line)) is not None), None)


def _number(text: str) -> Decimal | None:
    match = _NUMERIC.match(text.strip().rstrip("."))
    if match is None:
        return None
    try:
        value = Decimal(match["value"].replace(",", ""))
    except InvalidOperation:
        return None
    return -value if match["sign"] else value


def equal(a: str, b: str) -> bool:
    """Whether two final answers are the same: as numbers if both are, else as words without case and extra spaces.

    Numbers are compared by value, with thousands separators, a currency sign and a trailing unit left aside.
    """
    x, y = _number(a), _number(b)
    if x is not None and y is not None:
        return x == y
    return " ".join(a.casefold().split()).rstrip(".") == " ".join(b.casefold().split()).rstrip(".")
