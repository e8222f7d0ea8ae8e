"""Where final answers stand, and which of them are the same."""

import json
from pathlib import Path
from typing import Any

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


# ---- answers of real data and real models -----------------------------------------------------------------------

WRITTEN = [
    # GSM8K
    ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", "gsm8k", "18"),
    ("#### 1,080", "gsm8k", "1,080"),
    ("#### $5.50 in all", "gsm8k", "$5.50"),
    ("#### -3", "gsm8k", "-3"),
    ("#### 7\n\nI checked it with 3 and 4.", "gsm8k", "7"),
    ("#### 5\nNo, that is wrong.\n#### 6", "gsm8k", "6"),
    ("The answer is 42.", "gsm8k", "42"),
    ("So the answer is 5 + 3 = 8 apples for 2 days.", "gsm8k", "8"),
    ("The final answer is: $\\boxed{12}$. I hope it is correct.", "gsm8k", "12"),
    ("**Answer:** 1,234.50 dollars", "gsm8k", "1,234.50"),
    ("The answer is 3. The answer is 4.", "gsm8k", "4"),
    ("The answer is clear.\nThey have 3 + 4 = 7 eggs.", "gsm8k", "7"),
    ("They have 12 left, which is 3 each.", "gsm8k", "3"),
    ("Nobody knows.", "gsm8k", None),
    # boxes
    (r"so $x = \boxed{5}$.", "boxed", "5"),
    (r"\boxed{\frac{1}{2}}", "boxed", r"\frac{1}{2}"),
    (r"\boxed{\frac{\sqrt{\frac{2}{3}}}{5}}", "boxed", r"\frac{\sqrt{\frac{2}{3}}}{5}"),
    (r"first \boxed{3}, no: \boxed{4}", "boxed", "4"),
    (r"\boxed{\{1, 2\}}", "boxed", r"\{1, 2\}"),
    (r"\boxed {7}", "boxed", "7"),
    (r"\fbox{8}", "boxed", "8"),
    (r"$\boxed 9$", "boxed", "9"),
    (r"\boxed{10", "boxed", None),
    (r"\boxed{}", "boxed", None),
    (r"\boxed{" + "\n1/2\n}", "boxed", "1/2"),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", "boxed", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("No box. The answer is 11.", "boxed", "11"),
    # letters
    ("The answer is (B).", "choice", "B"),
    ("The correct answer is C because iron rusts.", "choice", "C"),
    ("I weigh A and B.\nD", "choice", "D"),
    ("(E)", "choice", "E"),
    ("**B**", "choice", "B"),
    ("B) a blue whale", "choice", "B"),
    ("C. 42", "choice", "C"),
    ("Answer: A", "choice", "A"),
    ("option (d) it is", "choice", "D"),
    (r"\boxed{\text{(C)}}", "choice", "C"),
    (r"so \boxed{B}$.", "choice", "B"),
    ("#### D", "choice", "D"),
    ("The answer is a house.", "choice", None),
    ("The answer is Berlin.", "choice", None),
    ("A cat sat there.", "choice", None),
]


@pytest.mark.parametrize(("text", "rule", "expected"), WRITTEN)
def test_written_answers(text: str, rule: str, expected: str | None) -> None:
    assert extract(text, rule) == expected


SAME = [
    # thousands, decimals, signs
    ("1,080", "1080"),
    ("109,200,000", "109200000"),
    (r"1{,}234", "1234"),
    (r"12\,345", "12345"),
    ("3", "3.0"),
    ("3.", "3"),
    ("+5", "5"),
    ("−5", "-5"),
    ("–5", "-5"),
    ("$-3", "-3"),
    ("-$3.00", "−3"),
    # currency, percent, scale
    (r"\$18", "18"),
    ("£1,000", "1000"),
    ("18 dollars", "$18"),
    ("40%", "40"),
    (r"40\%", "40"),
    ("1.5 million", "1500000"),
    ("3 hundred", "300"),
    ("2e3", "2000"),
    (r"3 \times 10^{4}", "30000"),
    # fractions
    ("1/2", "0.5"),
    ("½", "1/2"),
    ("2½", "2.5"),
    ("7 1/2", "7.5"),
    ("2/4", "1/2"),
    ("-3/2", "-1.5"),
    (r"\frac{1}{2}", "0.5"),
    (r"\dfrac{1}{8}", "1/8"),
    (r"\tfrac12", "1/2"),
    (r"-\frac{10}{3}", "-10/3"),
    (r"2\frac{1}{2}", "2.5"),
    (r"\frac{25}{9}", "2.7777777777777777"),
    (r"\frac{2}{3}", "0.666667"),
    # units
    ("10 cm", "10"),
    (r"10\text{ cm}", "10"),
    (r"12 \text{ cm}^2", "12"),
    ("5m", "5"),
    ("60 miles per hour", "60"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", "90"),
    ("7.5 degrees", "7.5"),
    # LaTeX and markdown
    ("$5$", "5"),
    (r"\(5\)", "5"),
    (r"\[ 5 \]", "5"),
    ("**5**", "5"),
    ("x = 5", "5"),
    (r"x \in (1, 2)", "(1,2)"),
    (r"\left(3, 4\right)", "(3,4)"),
    (r"(0,\infty)", r"(0, \infty)"),
    (r"(\frac{1}{2}, 3)", "(0.5, 3.0)"),
    ("(1, 2), (3, 4)", "(1,2),(3,4.0)"),
    (r"\frac{\sqrt3}{2}", r"\dfrac{\sqrt{3}}{2}"),
    (r"4 + 2\sqrt{3}", r"4+2\sqrt{3}"),
    ("18+10i", "18 + 10i"),
    (r"\text{odd}", "odd"),
    # letters, words, punctuation
    ("(B)", "B"),
    ("B.", "b"),
    (r"\text{(C)}", "C"),
    ("D)", "D"),
    ("7;", "7"),
    ("June,", "june"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_same(a: str, b: str) -> None:
    assert equal(a, b)
    assert equal(b, a)


OTHER = [
    ("50%", "0.5"),
    ("1.5 million", "1.5"),
    ("1/2", "1/3"),
    ("1/3", "0.33"),
    ("1/3", "0.333334"),
    ("1/0", "1"),
    ("2x", "2"),
    ("8pi", "8"),
    (r"8\pi", "8"),
    ("2sqrt(x)", "2"),
    (r"2\sqrt{3}", "2"),
    ("5 + x", "5"),
    ("5!", "5"),
    ("10^2", "10"),
    ("(1, 2)", "(2, 1)"),
    ("(1, 2)", "[1, 2]"),
    ("(1, 2)", "(1, 2, 3)"),
    ("0,1", "1"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\sqrt{2}", r"\sqrt{3}"),
    ("x = 5", "x = 6"),
    ("A", "B"),
    ("(A)", "1"),
    ("1e9999", "1"),
]


@pytest.mark.parametrize(("a", "b"), OTHER)
def test_not_same(a: str, b: str) -> None:
    assert not equal(a, b)
    assert not equal(b, a)


# ---- what belongs to the value, and what is no answer -----------------------------------------------------------

READ = [
    # fractions are whole
    ("#### 3/4", "gsm8k", "3/4"),
    ("#### 3 / 5", "gsm8k", "3 / 5"),
    ("#### -3/4 of a pie", "gsm8k", "-3/4"),
    ("#### 2 1/2 hours", "gsm8k", "2 1/2"),
    ("The answer is $\\frac{3}{4}$.", "gsm8k", "3/4"),
    ("So the answer is 2½ cups.", "gsm8k", "2 1/2"),
    ("It is 1/2 + 1/4 = 3/4 in all.", "number", "3/4"),
    # what changes a value stays with it
    ("#### 5 million", "gsm8k", "5 million"),
    ("#### 9 squared", "gsm8k", "9 squared"),
    ("#### 2 thirds of it", "gsm8k", "2 thirds"),
    ("#### 2 and a half", "gsm8k", "2 and a half"),
    ("#### 10^2", "gsm8k", "10^2"),
    ("#### 3 x 10^4", "gsm8k", "3 x 10^4"),
    ("#### twice 9", "gsm8k", "twice 9"),
    ("#### half of 18", "gsm8k", "half of 18"),
    ("The answer is 8\\pi.", "gsm8k", "8\\pi"),
    ("#### 6 or seven", "gsm8k", "6 or seven"),
    ("#### 76 sixth graders", "gsm8k", "76"),
    ("#### 12 cm^2", "gsm8k", "12"),
    ("Its area is 12 cm^2.", "number", "12"),
    # two values for one answer
    ("#### 6 or 7", "gsm8k", None),
    ("#### either 6 apples or 7 apples", "gsm8k", None),
    ("#### between 6 and 7", "gsm8k", None),
    ("#### 6 to 7", "gsm8k", None),
    ("#### 6-7", "gsm8k", None),
    ("#### 6 – 7", "gsm8k", None),
    ("#### $6-$7", "gsm8k", None),
    ("#### 6, maybe 7", "gsm8k", None),
    ("#### 6 or maybe even 7", "gsm8k", None),
    ("#### 6 and 7", "gsm8k", None),
    ("#### 6, 7", "gsm8k", None),
    ("#### 12 34", "gsm8k", None),
    ("#### 2 hours 30 minutes", "gsm8k", None),
    ("#### 5 - 12", "gsm8k", None),
    ("#### 3 * 4", "gsm8k", None),
    ("#### 3:4", "gsm8k", None),
    ("The answer is x = 5 or x = 6.", "gsm8k", None),
    ("The answer is 3 + 3 = 6 or 7.\nIt is 6.", "gsm8k", None),
    ("It takes 6 or 7", "number", None),
    ("It takes 6 to 7 days", "number", None),
    ("It is 10-12.", "number", None),
    ("It is between 6 and 7.", "number", None),
    ("It is somewhere in 10–12", "gsm8k", None),
    ("The answer is B or C.", "choice", None),
    ("The answer is (B) or (C).", "choice", None),
    ("B) or C)", "choice", None),
    (r"\boxed{6} or \boxed{7}", "boxed", "6 or 7"),
    (r"$\boxed{6}$ or $\boxed{6.0}$", "boxed", "6.0"),
    # one value all the same
    ("#### either 6 or 6", "gsm8k", "6"),
    ("#### 6 or 6.0", "gsm8k", "6"),
    ("The answer is x = 5 or y = 5.", "gsm8k", "5"),
    ("#### about 6?", "gsm8k", "6"),
    ("#### 6 or so", "gsm8k", "6"),
    ("#### 8 in 2 days", "gsm8k", "8"),
    ("#### 8 apples each 2 days", "gsm8k", "8"),
    ("#### 18 (9 * 2 = 18)", "gsm8k", "18"),
    ("Step 2: 15 apples", "number", "15"),
    ("It is 14.28, which rounds down to 14%.", "number", "14"),
    ("It is 13.6, rounded to 14.", "number", "14"),
    ("The answer is B or B.", "choice", "B"),
    ("The answer is B and I am sure.", "choice", "B"),
    ("The answer is A or B, no: the answer is C.", "choice", "C"),
    # signs
    ("#### -12", "gsm8k", "-12"),
    ("The answer is x = -12.", "gsm8k", "-12"),
    ("The answer is 5 - 12 = -7.", "gsm8k", "-7"),
    ("It fell from 5 by 12: 5 - 12 = -7.", "number", "-7"),
    ("It fell to –12", "number", "–12"),
    ("They have COVID-19", "number", "19"),
    ("#### $-3", "gsm8k", "-3"),
    ("#### (-3)", "gsm8k", "-3"),
]


@pytest.mark.parametrize(("text", "rule", "expected"), READ)
def test_a_value_is_read_whole_or_not_at_all(text: str, rule: str, expected: str | None) -> None:
    assert extract(text, rule) == expected


UNITS = [
    ("18 dollars", "18"),
    ("5 apples", "5"),
    ("5 red apples", "5"),
    ("12 chocolate chip cookies", "12"),
    ("5 people", "5"),
    ("7 more apples", "7"),
    ("7 days left", "7"),
    ("5 apples each", "5"),
    ("5 each", "5"),
    ("5 a day", "5"),
    ("3 slices of pizza", "3"),
    ("1 apple", "1"),
    ("1/2 apple", "0.5"),
    ("3/4 of the cake", "0.75"),
    ("50 percent", "50%"),
    ("50% of people", "50"),
    ("60 km/h", "60"),
    ("9.8 m/s^2", "9.8"),
    ("5 lbs.", "5"),
    ("12 sq. ft.", "12"),
    ("12 cm squared", "12"),
    ("5 in", "5"),
    ("8 years old", "8"),
    ("5th", "5"),
    ("76 sixth graders", "76"),
    ("7 eggs, I think", "7"),
    ("18 dollars. I hope it is correct", "18"),
    ("2 dozen", "24"),
    ("2 dozen eggs", "24"),
    ("4 hundred", "400"),
    ("5 hundred thousand", "500000"),
    ("$2.5 million dollars", "2500000"),
    ("3 x 10^4", "30000"),
    ("8pm", "8 p.m."),
]


@pytest.mark.parametrize(("a", "b"), UNITS)
def test_a_unit_is_left_aside_and_a_factor_is_not(a: str, b: str) -> None:
    assert equal(a, b)
    assert equal(b, a)


NO_UNITS = [
    ("9 squared", "9"),
    ("2 cubed", "2"),
    ("2 thirds", "2"),
    ("3 quarters", "3"),
    ("3 fifths", "3"),
    ("5 thousandths", "5"),
    ("2 dozen", "2"),
    ("5 million", "5"),
    ("4 hundred", "4"),
    ("4 tens", "4"),
    ("4 hundred fifty", "400"),
    ("2 and a half", "2"),
    ("1 half", "1"),
    ("1 third", "1"),
    ("9 twice", "9"),
    ("half of 9", "9"),
    ("twice 9", "9"),
    ("6 or 7", "6"),
    ("6 or 7", "7"),
    ("6-7", "6"),
    ("10-12", "-12"),
    ("10-12", "10"),
    ("between 6 and 7", "6"),
    ("6 or seven", "6"),
    ("6, not seven", "6"),
    ("6 minus one", "6"),
    ("5 fewer", "5"),
    ("5 below zero", "5"),
    ("5 below", "5"),
    ("5 less than x", "5"),
    ("6 times the apples", "6"),
    ("2 x", "2"),
    ("5K", "5"),
    ("$5M", "5"),
    ("$5m", "5"),
    ("$5 bn", "5"),
    ("8 am", "8 pm"),
    ("101 in binary", "101"),
    ("3. Pizza", "3"),
    ("2010 Spain", "2010"),
    ("5 and counting", "5"),
    ("2cos", "2"),
    ("1log", "1"),
]


@pytest.mark.parametrize(("a", "b"), NO_UNITS)
def test_what_is_no_unit_is_not_left_aside(a: str, b: str) -> None:
    assert not equal(a, b)
    assert not equal(b, a)


INSTRUCT = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "instruct"
files_at_hand = pytest.mark.skipif(not INSTRUCT.is_dir(), reason="the public data files are not beside the checkout")


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (INSTRUCT / name).open(encoding="utf-8")]


@files_at_hand
@pytest.mark.data
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_reference_of_gsm8k_extracts(split: str, count: int) -> None:
    rows = rows_of(f"gsm8k/{split}.jsonl")
    assert len(rows) == count
    for row in rows:
        found = extract(row["answer"], "gsm8k")
        assert found is not None, row["answer"]
        marked = row["answer"].rsplit("#### ", 1)[1]
        assert found == marked, row["answer"]
        assert equal(found, str(int(marked.replace(",", ""))))


@files_at_hand
@pytest.mark.data
@pytest.mark.parametrize(("number", "disagreeing"), [(1, [("90000", "900"), ("0,1", "1")]), (2, [])])
def test_openmathinstruct_solutions_agree_with_their_answers(number: int, disagreeing: list[tuple[str, str]]) -> None:
    """The two of the first sample are wrong in the data: the solution states another answer than the column."""
    rows = rows_of(f"openmathinstruct{number}/train.jsonl")
    assert len(rows) == 100
    found = [(row["expected_answer"], extract(row["generated_solution"], "boxed")) for row in rows]
    assert [pair for pair in found if pair[1] is None or not equal(*pair)] == disagreeing
