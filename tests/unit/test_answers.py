"""Where final answers stand, and which of them are the same."""

import pytest

from sdd.answers import RULES, equal, extract
from sdd.errors import UserError

TEXTS = {
    "formal": "Step 1: 3 + 4 = 7.\nThe answer is 7.",
    "marked": "3 + 4 = 7 i guess\n#### 7",
    "short": "3 + 4 = 7 yeah\nans: 7",
    "trailing blank lines": "The answer is 7.\n\n  \n",
    "colon and case": "THE ANSWER IS: 7",
    "in a sentence": "So the answer is 7.",
}


@pytest.mark.parametrize("text", list(TEXTS.values()), ids=list(TEXTS))
@pytest.mark.parametrize("rule", ["final", "anywhere", "number"])
def test_known_forms_on_the_last_line(text: str, rule: str) -> None:
    assert extract(text, rule) == "7"
    assert extract(text, "none") is None


@pytest.mark.parametrize(
    ("text", "rule", "expected"),
    [
        ("The answer is 7.\nIs that right?", "final", None),
        ("The answer is 7.\nIs that right?", "anywhere", "7"),
        ("The answer is 7.\nNo, the answer is 8.\nok", "anywhere", "8"),
        ("The answer is 7.\nNo, the answer is 8.\nok", "final", None),
        ("I have 5, 6 and 7.", "number", "7"),
        ("it costs $1,234.50 in all", "number", "$1,234.50"),
        ("1, 2, 3, done", "number", "3"),
        ("it fell to -12.", "number", "-12"),
        ("a half is .5", "number", ".5"),
        ("version 1.2.3", "number", "3"),
        ("no figures here", "number", None),
        ("no figures here", "final", None),
        ("", "final", None),
        (" \n ", "anywhere", None),
        ("The answer is e a c b.", "final", "e a c b"),
        ("The answer is 3.5.", "final", "3.5"),
        ("The answer is 1,234 dollars.", "final", "1,234 dollars"),
        ("#### -5", "final", "-5"),
        ("The number of beans: 7", "anywhere", None),
    ],
)
def test_extract(text: str, rule: str, expected: str | None) -> None:
    assert extract(text, rule) == expected


def test_an_unknown_rule_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"dataset\.answer_rule=last is unknown; choose one of " + ", ".join(RULES)):
        extract("The answer is 7.", "last")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("7", "7"),
        ("7", "7.0"),
        ("7", "07"),
        ("7.50", "7.5"),
        ("0.5", ".5"),
        ("1,234", "1234"),
        ("1,234,567.80", "1234567.8"),
        ("$5", "5"),
        ("€5.00", "5"),
        ("-$3", "-3"),
        ("−3", "-3"),
        ("12 apples", "12"),
        ("12 square metres", "12 m"),
        ("50%", "50"),
        ("5 €", "5"),
        ("7.", "7"),
        (" 7 ", "7"),
        ("Blue", "blue"),
        ("blue  moss", "Blue Moss"),
        ("e a c", "e a c."),
    ],
)
def test_the_same_answer_in_other_clothes(a: str, b: str) -> None:
    assert equal(a, b)
    assert equal(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("7", "8"),
        ("7", "-7"),
        ("7", "70"),
        ("1,234", "1.234"),
        ("1,23", "123"),
        ("1,2345", "12345"),
        ("7.5", "75"),
        ("0.1", "0.10000001"),
        ("12 34", "1234"),
        ("12 34", "12"),
        ("7 1/2", "7"),
        ("3 of 4", "3"),
        ("blue moss", "moss blue"),
        ("blue", "7"),
        ("seven", "7"),
        ("", "0"),
        ("a b c", "abc"),
    ],
)
def test_other_answers(a: str, b: str) -> None:
    assert not equal(a, b)
    assert not equal(b, a)
