r"""Final answers: where they stand in a text, and when two of them are equal.

Rules: `final` wants the answer on the last line in one of the known forms ("The answer is 7.", "#### 7", "ans: 7");
`anywhere` takes the last such form anywhere in the text; `number` takes the last number; `gsm8k` takes the number after
the last "####", else that of the last "answer is", else the last number; `boxed` takes what the last \boxed{} holds,
else the last stated form; `choice` takes the letter of a multiple-choice answer; `none` extracts nothing.

A number is read with what belongs to its value ("3/4", "2 1/2", "5 million", "9 squared"). Two values for one answer
("6 or 7", "6-7", "between 6 and 7") are none for `number` and `gsm8k`; the rules that take an answer as it is written
keep both, and that is equal to neither.

Equality is by value where both are numbers (separators, currency, units, percent signs, fractions and LaTeX spellings
are clothes), member by member for tuples, else by the words. What stands behind a number is left aside only if it is a
known unit or things that are counted ("12 red apples"). It never evaluates an expression. Knows nothing of models or
datasets.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

from sdd.errors import UserError

RULES = ("final", "anywhere", "number", "gsm8k", "boxed", "choice", "none")

LONGEST = 1000
"""Characters of an answer that may be a number or a tuple."""

_FORM = re.compile(
    r"(?:the answer is:?[ ]*(?P<said>.+?)\.?|####[ ]*(?P<marked>.+?)|\bans:[ ]*(?P<short>.+?))[ ]*$", re.I
)
_SCALES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_TEEN = r"(?:thir|four|fif|six|seven|eigh|nine)teen"
_TY = r"(?:twen|thir|for|fif|six|seven|eigh|nine)t"
_COUNT = rf"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|{_TEEN}|{_TY}y(?:-\w{{3,5}})?)"
_ORDINAL = rf"(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|{_TEEN}|{_TY}ie|hundred|thousand|\w{{1,5}}illion)th"
_PART = rf"(?:half|halves|thirds|quarters?|{_ORDINAL}s)"
_FACTOR = rf"(?:(?:{'|'.join(_SCALES)})s?|{_PART}|tens|score|gross|squared|cubed|factorial)"
_DIGITS = r"(?:\d++(?:,\d++)*+(?:\.\d++)?+|(?<!\w)\.\d++)"
_NUMBER = re.compile(
    r"(?:\b(?:twice|double|triple|half|third|quarter|minus|negative|not|root|sqrt)(?: of| an?| the)*+[^\w\s]*+\s?"
    r"|√)?"
    r"(?<![\d^_])(?<!\^\{)"  # no exponent, no index
    r"(?:(?<![\w.)\]}%])(?<!\d\s)[-−–](?: (?=\d+/))?)?[$€£]?"  # a dash behind a number or a word is no sign
    rf"(?:\d++ \d++/\d++|{_DIGITS}(?:\s?/\s?{_DIGITS})?+)"
    r"(?:e[-+]?\d++(?!\w)|\s?(?:\\times|\\cdot|[*×x])\s?10\^\{?[-−]?\d++\}?|\^\{?[-−\w]++\}?|[²³])?+(?:\s?(?:\\?pi(?!\w)|π))?+"
    rf"(?:[\s-]{_FACTOR}(?![\w-])"
    rf"|(?:\s[a-z]{{1,20}}+)?\s(?:or|and|to|point)\s(?:an?\s)?(?:{_FACTOR}|{_COUNT}|third|{_ORDINAL}|more|less|fewer)(?![\w-]))*+",
    re.I,
)
"""A number, with the words and signs around it that make another value of it."""
_WORD = re.compile(r"[^\W\d_]+|[^\w\s]")
_CLOTHES = frozenset("\\${}()*€£\"'")
_HEDGE = re.compile(r"maybe|perhaps|possibly|probably|about|around|approximately|roughly|almost|nearly|even|either")
_RANGE = frozenset({"or", "to", "through", *"-–—−/"})
_LIST = _RANGE | {"and", "times", "cdot", "plus", "minus", "sqrt", *"&,;:+x×^√~"}
"""What makes two numbers one answer of two values: anywhere, and where the answer is due."""
_OR_BOX = re.compile(r"box(?:ed)?\s?\{([^{}]*)\}[\s$,]*or[\s$]*$")
_ALTERNATIVE = re.compile(r"\bor\s+(?=\\?[A-Za-z]\w*+\s*+=)")
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


def _joined(between: str, joints: frozenset[str]) -> bool:
    """Whether two numbers with this between them are one answer of two values."""
    if len(between) > 50:
        return False
    words = [word for word in _WORD.findall(between.casefold()) if word not in _CLOTHES]
    firm = [word for word in words if not _HEDGE.fullmatch(word)]
    if firm and firm[-1] in joints:
        return len(firm) <= 3 and not any(word.startswith("round") for word in firm)
    is_bare = not firm or (len(firm) == 1 and _is_unit(firm[0]) and not _PLACED.fullmatch(firm[0]))
    return is_bare and (firm != words or joints >= _LIST)  # "6 maybe 7" and, where the answer is due, "6 ft 7 in"


def _numbers(text: str, joints: frozenset[str]) -> Iterator[str | None]:
    """The numbers in a text, each once with those that it is joined to; None where these are of different values."""
    text = _FRACTION.sub(r" \g<over>/\g<under>", _VULGARS.sub(lambda match: _VULGAR[match[0]], text))
    matches = list(_NUMBER.finditer(text))
    values: dict[str, None] = {}
    for at, match in enumerate(matches):
        after = matches[at + 1] if at + 1 < len(matches) else None
        values[match[0].strip()] = None
        is_between = "between" in text[max(0, match.start() - 10) : match.start()].casefold()
        if after is None or not _joined(text[match.end() : after.start()], joints | {"and"} if is_between else joints):
            first = next(iter(values))
            yield first if len(values) == 1 or all(equal(value, first) for value in values) else None
            values = {}


def _last_number(text: str) -> str | None:
    return next(reversed(list(_numbers(text, _RANGE))), None)


def _claims(text: str) -> list[str | None]:
    """The number that a statement like "5 + 3 = 8 apples for 2 days" claims: the first after its last equals sign.

    None where it claims several in one; there may be more than one in "x = 5 or x = 6", and there may be none.
    """
    statements = [statement.rsplit("=", 1)[-1] for statement in _ALTERNATIVE.split(text)]
    return [number for statement in statements for number in islice(_numbers(statement, _LIST), 1)]


def _gsm8k(text: str) -> str | None:
    statements = [text.rsplit("####", 1)[1].split("\n", 1)[0]] if "####" in text else []
    statements += [match["said"] for match in reversed(list(_ANSWER_IS.finditer(text)))]
    for statement in statements:
        if claims := _claims(statement):
            first = claims[0]
            return first if all(first and claim and equal(claim, first) for claim in claims) else None
    return _last_number(text)


def _boxed(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} holds, braces balanced; None if there is none, or it is not closed."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    other = _OR_BOX.search(text[max(0, start - 80) : start])
    rest = text[start:].split("box", 1)[1].removeprefix("ed").lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].split()[0].rstrip(".,") if rest.split("$")[0].strip() else None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest, re.S):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0 and match[0] == "}":
            box = rest[1 : match.start()].strip()
            return f"{other[1]} or {box}" if other and not equal(other[1], box) else box or None
    return None


def _is_only(letter: str, rest: str) -> bool:
    """Whether no other letter stands beside this one, as in "B or C"."""
    other = re.match(r"\W{0,4}(?:or|and|/|&)\W{0,4}([B-HJ](?![\w'])|[AI](?![\w']|\s[a-z]))", rest)
    return other is None or other[1] == letter.upper()


def _choice(text: str, lines: list[str]) -> str | None:
    for candidate in (_boxed(text), _stated(lines[-1]), lines[-1].strip()):
        if candidate and (match := _LONE_LETTER.match(undressed := _undressed(candidate))):
            return match["letter"] if _is_only(match["letter"], undressed[match.end("letter") :]) else None
    for match in reversed(list(_CHOICE.finditer(text))):
        letter, rest = match["letter"] or match["small"], text[match.end() : match.end() + 20]
        if not (letter in "AI" and re.match(r"\s+(?!because|since|as\b|or\b|and\b)[a-z]", rest)):  # "is A house"
            return letter.upper() if _is_only(letter, rest) else None
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
_VULGARS = re.compile(f"[{''.join(_VULGAR)}]")
_FRACTION = re.compile(r"\\[dtc]?frac\s*+\{\s*+(?P<over>-?[\d.,]++)\s*+\}\s*+\{\s*+(?P<under>[\d.,]++)\s*+\}")
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
    (_FRACTION, r" \g<over>/\g<under>"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|×"), "*"),
    (re.compile(r"(?<=\d)\s?([ap])\.?m\b\.?", re.I), r" \1m"),
    (re.compile(r"\\([%$#&_])"), r"\1"),
)
_VALUE = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+\.?)"
_NUMERIC = re.compile(
    rf"[$€£¥]?\s*(?P<sign>[-+]?)\s*[$€£¥]?\s*(?:(?P<whole>\d+)\s+(?=\d+/))?(?P<value>{_VALUE})(?:\s*/\s*(?P<under>{_VALUE}))?"
    r"(?:\s*[*x]\s*10\^\{?(?P<power>-?\d+)\}?|[eE](?P<exponent>[-+]?\d+))?"
    r"(?P<unit>\s*[A-Za-z%€£$¥](?:[^\d+*=<>\\{}^]|\^\{?[23]\}?|[²³])*)?"
)
_UNIT = re.compile(
    r"""(?: % | percent | pct | point | unit | piece | pc | time | [$€£¥] | usd | eur | gbp | dollar | buck | cent |
    penny | pence | pound | euro | yen | rupee | peso | franc | second | sec | minute | min | hour | hr | day |
    week | wk | month | year | yr | decade | century | o'clock | [cmk]?m | (?:milli|centi|kilo)?met(?:re|er) |
    in | inch | foot | feet | ft | yard | yd | mile | mi | [mk]?g | (?:milli|kilo)?gram | ounce | oz | lb | ton
    | tonne | [mcd]?l | (?:milli)?lit(?:re|er) | gallon | gal | quart | pint | cup | tsp | tbsp | teaspoon |
    tablespoon | square | sq | cubic | cu | acre | hectare | mph | kph | kmh | knot | degree | celsius |
    fahrenheit | kelvin | radian | rad | k?hz | k?wh? | watt | volt | ohm | joule | newton | k?cal | calorie |
    bit | byte | [kmg]b | st | nd | rd | th )s?""",
    re.I | re.X,
)
_LETTERS = frozenset("cghlmsACFJLNVW")
"""Units of one letter. Not among them: K and M, which may be thousands and millions."""
_UNIT_WORD = re.compile(r"[^\W\d_](?:[^\W\d_]|['’-])*|[%$€£¥]")
_PLURAL = re.compile(r"\w{3,}(?<![su])s|\w*(?:men|people|children|teeth|mice|geese|fish|sheep|deer)", re.I)
_THING = re.compile(rf"(?!(?:third|{_ORDINAL})$)\w{{3,}}", re.I)
_PLACED = re.compile(
    "%|percent|each|left|total|altogether|remaining|overall|old|tall|long|wide|deep|high|away|more|worth|"
    "(?P<more>per|of|an?|every|for|in|at|on)",
    re.I,
)
"""What may stand behind a unit, or in its place ("5 each", "5 a day"): alone, and with more behind it."""
_CHANGING = re.compile(
    rf"{_COUNT}|{_FACTOR}|twice|thrice|double|triple|or|not|no|wait|actually|than|less|fewer"
    "|minus|plus|over|under|above|below"
    "|binary|octal|hex|hexadecimal|base|[ap]m|pi|sqrt|sin|cos|tan|log|ln|exp",
    re.I,
)
"""Words that make another value of a number, or another answer."""
_OPERATOR = re.compile(r"\s*([-+*/=^<>,(){}\[\]])\s*")
_NAMED = re.compile(r"[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|\\in)\s*(?P<value>[^=]+)")
_FEWEST_DECIMALS = 6
"""A decimal of at least so many places may stand for a fraction that it was rounded from."""


def _undressed(text: str) -> str:
    """The answer without delimiters, LaTeX spellings of plain things, and trailing punctuation."""
    text = text.strip().replace("−", "-").replace("⁄", "/")
    text = re.sub(r"^[–—]", "-", text)
    text = _VULGARS.sub(lambda match: _VULGAR[match[0]], text)
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


def _is_unit(word: str) -> bool:
    return word in _LETTERS if len(word) == 1 and word.isalpha() else _UNIT.fullmatch(word) is not None


def _factor(text: str, is_one: bool) -> int | None:
    """What the words behind a number multiply it by; None if they are neither a unit nor things that are counted.

    `is_one` is for a value to which a singular belongs: "1 apple", "1/2 apple". A clause behind the unit may say
    what it will ("7 eggs, I think"), but no other value.
    """
    text, *clause = re.split(r"[,;:(]|[.!?]\s+(?=[A-Z])", text.replace("(s)", "s"), maxsplit=1)
    words = _UNIT_WORD.findall(text.replace("/", " per "))
    factor = 1
    while words and (scale := _SCALES.get(words[0].casefold().removesuffix("s"))):
        factor, words = factor * scale, words[1:]
    if len(words) > 1 and words[-1] in ("squared", "cubed"):
        words.pop()
    if any(_CHANGING.fullmatch(word) for word in [*words, *_UNIT_WORD.findall(" ".join(clause))]):
        return None
    if not words or (len(words) == 1 and _is_unit(words[0])):
        return factor
    end = next((at for at, word in enumerate(words) if _PLACED.fullmatch(word)), len(words))
    thing, last = words[:end], _PLACED.fullmatch(words[-1])
    if (last and last["more"] not in (None, "in")) or "times" in words[:-1] or len(thing) > 4:
        return None
    if thing and not (_is_unit(thing[-1]) or _PLURAL.fullmatch(thing[-1]) or (is_one and _THING.fullmatch(thing[-1]))):
        return None
    return factor


def _number(text: str) -> tuple[Fraction, int | None] | None:
    """(value, decimal places or None for a fraction) of an undressed answer; None if it is no number."""
    match = _NUMERIC.fullmatch(text)
    if match is None:
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
    unit = match["unit"] or ""
    factor = _factor(unit, abs(value) <= 1)
    if factor is None or (
        len(unit.strip()) == 1 and unit.strip().isalpha() and text[0] in "$€£¥"
    ):  # $5m is five million
        return None
    value *= Fraction(10) ** power * factor
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
