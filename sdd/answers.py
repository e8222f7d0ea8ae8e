r"""Final answers: where they stand in a text, and when two of them are equal.

Rules: `final` wants the answer on the last line in one of the known forms ("The answer is 7.", "#### 7", "ans: 7");
`anywhere` takes the last such form anywhere in the text; `number` takes the last number; `gsm8k` takes the number after
the last "####", else that of the last "answer is", else the last number; `boxed` takes what the last \boxed{} holds,
else the last stated form; `choice` takes the letter of a multiple-choice answer; `none` extracts nothing.

Equality is by value where both are numbers (separators, currency, units, percent signs, fractions and LaTeX spellings
are clothes), member by member for tuples, else by the words. It never evaluates an expression. Knows nothing of models
or datasets.
"""

import re
from fractions import Fraction

from sdd.errors import UserError

RULES = ("final", "anywhere", "number", "gsm8k", "boxed", "choice", "none")

LONGEST = 1000
"""Characters of an answer that may be a number or a tuple."""

_FORM = re.compile(
    r"(?:the answer is:?[ ]*(?P<said>.+?)\.?|####[ ]*(?P<marked>.+?)|\bans:[ ]*(?P<short>.+?))[ ]*$", re.I
)
_NUMBER = re.compile(r"[-−]?[$€£]?(?:\d[\d,]*(?:\.\d+)?|(?<!\w)\.\d+)")
_ANSWER_IS = re.compile(r"answer\**\s*(?:is|:|=)+(?P<said>.+?)(?:\.\s|$)", re.I | re.M)
_CHOICE = re.compile(
    r"(?i:answer|option|choice)\**+\s*+(?i:is|:)*+\s*+(?:\\text\{)?[*$({\[]*(?:(?P<letter>[A-J])(?![\w'])|(?<=\()(?P<small>[a-j])\))"
)
_LONE_LETTER = re.compile(r"[*$(\[]*(?P<letter>[A-J])[*$)\].:]*(?:$|(?<=[).:])\s+\S)")


def _stated(line: str) -> str | None:
    match = _FORM.search(line.strip())
    if match is None:
        return None
    return next(value for value in match.groups() if value is not None).strip()


def _stated_anywhere(lines: list[str]) -> str | None:
    return next((found for line in reversed(lines) if (found := _stated(line)) is not None), None)


def _last_number(text: str) -> str | None:
    numbers: list[str] = _NUMBER.findall(text)
    return numbers[-1].rstrip(",") if numbers else None


def _claimed_number(text: str) -> str | None:
    """The number that a statement like "5 + 3 = 8 apples for 2 days" claims: the first after its last equals sign."""
    match = _NUMBER.search(text.rsplit("=", 1)[-1])
    return match[0].rstrip(",") if match else None


def _gsm8k(text: str) -> str | None:
    claims = [text.rsplit("####", 1)[1].split("\n", 1)[0]] if "####" in text else []
    claims += [match["said"] for match in reversed(list(_ANSWER_IS.finditer(text)))]
    return next((found for claim in claims if (found := _claimed_number(claim)) is not None), _last_number(text))


def _boxed(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} holds, braces balanced; None if there is none, or it is not closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("box", 1)[1].removeprefix("ed").lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].split()[0].rstrip(".,") if rest.split("$")[0].strip() else None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest, re.S):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            return rest[1 : match.start()].strip() or None
    return None


def _choice(text: str, lines: list[str]) -> str | None:
    boxed = _boxed(text)
    stated = _stated(lines[-1])
    for candidate in (boxed, stated, lines[-1].strip()):
        if candidate and (match := _LONE_LETTER.match(_undressed(candidate))):
            return match["letter"]
    for match in reversed(list(_CHOICE.finditer(text))):
        letter = match["letter"] or match["small"]
        if not (letter in "AI" and re.match(r"\s+(?!because|since|as\b)[a-z]", text[match.end() :])):  # "is A house"
            return letter.upper()
    return None


def extract(text: str, rule: str) -> str | None:
    """The final answer in `text`, as written; None where there is none."""
    if rule not in RULES:
        raise UserError(f"dataset.answer_rule={rule} is unknown; choose one of {', '.join(RULES)}")
    lines = [line for line in text.strip().split("\n") if line.strip()]
    if rule == "none" or not lines:
        return None
    if rule == "number":
        return _last_number(text)
    if rule == "gsm8k":
        return _gsm8k(text)
    if rule == "boxed":
        return _boxed(text) or _stated_anywhere(lines)
    if rule == "choice":
        return _choice(text, lines)
    return _stated(lines[-1]) if rule == "final" else _stated_anywhere(lines)


# ---- equality ---------------------------------------------------------------------------------------------------

_VULGAR = {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅛": " 1/8"}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_SPELLINGS = (
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr)(?![A-Za-z])"), ""),
    (re.compile(r"\\[!,;:]|\\(?:quad|qquad)(?![A-Za-z])"), ""),
    (re.compile(r"\\ |~"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname|boxed)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*\{([^{}]+)\}\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\frac\s*\{\s*(-?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
)
_VALUE = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+\.?)"
_NUMERIC = re.compile(
    rf"[$€£¥]?\s*(?P<sign>[-+]?)\s*[$€£¥]?\s*(?:(?P<whole>\d+)\s+(?=\d+/))?(?P<value>{_VALUE})(?:\s*/\s*(?P<under>{_VALUE}))?"
    r"(?:\s*\*\s*10\^\{?(?P<power>-?\d+)\}?|[eE](?P<exponent>[-+]?\d+))?"
    r"(?P<unit>\s*[A-Za-z%€£$¥](?:[^\d+*=<>\\{}^]|\^\{?[23]\}?|[²³])*)?"
)
_ALGEBRA = re.compile(r"(?![cghlmsACFJKLMNVW])[A-Za-z](?![A-Za-z])|pi(?![A-Za-z])|sqrt")
"""A symbol right behind a number, as in 2x or 8pi: no unit, unless it is one of the letters that stand for units."""
_OPERATOR = re.compile(r"\s*([-+*/=^<>,(){}\[\]])\s*")
_NAMED = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|\\in)\s*(?P<value>[^=]+)")
_FEWEST_DECIMALS = 6
"""A decimal of at least so many places may stand for a fraction that it was rounded from."""


def _undressed(text: str) -> str:
    """The answer without delimiters, LaTeX spellings of plain things, and trailing punctuation."""
    text = text.strip().replace("−", "-").replace("⁄", "/")
    text = re.sub(r"^[–—]", "-", text)
    text = re.sub("[" + "".join(_VULGAR) + "]", lambda match: _VULGAR[match[0]], text)
    before = None
    while before != text:
        before, text = text, text.strip().rstrip(".,;:").rstrip()
        for left, right in _DELIMITERS:
            inside = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inside and left not in inside:
                text = inside
        for spelling, plain in _SPELLINGS:
            text = spelling.sub(plain, text)
    if match := _NAMED.fullmatch(text):
        text = match["value"].strip()
    if match := re.fullmatch(r"\(([A-Za-z])\)?|([A-J])\)", text):
        text = match[1] or match[2]
    return text


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip(".") or "0")


def _number(text: str) -> tuple[Fraction, int | None] | None:
    """(value, decimal places or None for a fraction) of an undressed answer; None if it is no number."""
    match = _NUMERIC.fullmatch(text)
    if match is None:
        return None
    unit = (match["unit"] or "").strip()
    glued = bool(match["unit"]) and not match["unit"][0].isspace()
    if glued and _ALGEBRA.match(unit):
        return None
    value, places = _decimal(match["value"]), len(match["value"].partition(".")[2])
    if match["under"]:
        if not _decimal(match["under"]):
            return None
        value /= _decimal(match["under"])
    value += int(match["whole"] or 0)
    power = int(match["power"] or match["exponent"] or 0)
    if abs(power) > 1000:
        return None
    value *= Fraction(10) ** power * _SCALES.get(unit.split(" ")[0].casefold() if unit else "", 1)
    return (-value if match["sign"] == "-" else value), None if match["under"] else places


def _same_number(x: tuple[Fraction, int | None], y: tuple[Fraction, int | None]) -> bool:
    if x[0] == y[0]:
        return True
    if (x[1] is None) == (y[1] is None):
        return False
    (fraction, _), (decimal, places) = (x, y) if x[1] is None else (y, x)
    assert places is not None
    unit, gap = Fraction(1, 10**places), abs(fraction) - abs(decimal)
    return fraction * decimal > 0 and places >= _FEWEST_DECIMALS and -unit / 2 <= gap < unit


def _members(text: str) -> tuple[str, list[str]]:
    """The brackets around a tuple ("" if there are none) and the members between its commas."""
    depth, cuts = 0, [-1]
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and character in ")]}" and at == len(text) - 1 and cuts == [-1] and text[0] in "([{":
            return text[0] + text[-1], _members(text[1:-1])[1]
        if depth == 0 and character == ",":
            cuts.append(at)
    return "", [text[cut + 1 : end] for cut, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _words(text: str) -> str:
    text = _OPERATOR.sub(r"\1", " ".join(text.casefold().split()))
    return text.replace(" ", "") if "\\" in text else text


def equal(a: str, b: str) -> bool:
    """Whether two final answers are the same: as numbers if both are, as tuples of answers, else as words.

    Numbers are compared by exact value, with thousands separators, currency signs, percent signs and units left aside
    (50% is 50, not 0.5); a fraction also equals itself rounded or cut to six decimal places or more. Words are compared
    without case and extra spaces, and so is whatever is longer than `LONGEST`: no answer to compute with.
    """
    if max(len(a), len(b)) > LONGEST:
        return _words(a) == _words(b)
    a, b = _undressed(a), _undressed(b)
    x, y = _number(a), _number(b)
    if x is not None and y is not None:
        return _same_number(x, y)
    if _words(a) == _words(b):
        return True
    (brackets, left), (others, right) = _members(a), _members(b)
    if brackets != others or len(left) != len(right) or len(left) < 2:
        return False
    return all(equal(one, other) for one, other in zip(left, right, strict=True))
