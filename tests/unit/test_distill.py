"""Which rewrites become targets, and that a row never gets another row's answer."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from sdd.data import Example
from sdd.models.chats import LEAK_PHRASES
from sdd.rewriting.engines import Completion, Request
from sdd.rewriting.selection import (
    Selection,
    answer_correct,
    choose_target,
    chosen,
    rewrite_rows,
    shortest,
    with_noise,
)

SELECTION = Selection("anywhere", LEAK_PHRASES)
PROMPT, REFERENCE = "What is 3 + 4?", "3 + 4 = 7 yeah\n#### 7"


@pytest.mark.parametrize(
    ("rewrite", "finish", "reason"),
    [
        ("3 + 4 = 7.\nThe answer is 7.", "stop", None),
        ("The answer is 7.0.", "stop", None),
        ("", "too_long", "too_long"),
        ("", "stop", "empty"),
        (" \n", "stop", "empty"),
        ("", "length", "empty"),
        ("3 + 4 = 7.\nThe answer is 7.", "length", "truncated"),
        ("As the REFERENCE answer says, the answer is 7.", "stop", "leak"),
        ("In my own words: the answer is 7.", "stop", "leak"),
        ("Task: 3 + 4\nThe answer is 7.", "stop", "leak"),
        ("The answer is 8.", "stop", "answer"),
        ("The answer is 70.", "stop", "answer"),
        ("Seven, of course", "stop", "answer"),
        ("In my own words: the answer is 8.", "length", "truncated"),
    ],
)
def test_reasons(rewrite: str, finish: str, reason: str | None) -> None:
    assert SELECTION.refusal(PROMPT, REFERENCE, rewrite, finish) == reason


def test_without_a_final_answer_there_is_nothing_to_compare() -> None:
    assert SELECTION.refusal("Say hello.", "hello there", "Good day.", "stop") is None
    assert Selection("none").refusal(PROMPT, REFERENCE, "The answer is 8.", "stop") is None


def test_a_phrase_that_the_task_uses_itself_is_no_leak() -> None:
    rewrite = "The reference is page 3. The answer is 7."
    assert SELECTION.refusal(PROMPT, REFERENCE, rewrite, "stop") == "leak"
    assert SELECTION.refusal("What does The Reference say? " + PROMPT, REFERENCE, rewrite, "stop") is None
    assert SELECTION.refusal(PROMPT, "by the reference\n" + REFERENCE, rewrite, "stop") is None


def row(rewrite: str, finish: str = "stop", id: str = "a") -> dict[str, Any]:
    return {"id": id, "prompt": PROMPT, "reference": REFERENCE, "rewrite": rewrite, "finish": finish}


def test_a_passing_rewrite_is_the_target_and_a_refused_one_leaves_the_reference() -> None:
    kept = {"id": "a", "prompt": PROMPT, "reference": REFERENCE}
    assert choose_target(row("The answer is 7."), SELECTION, 0.0) == kept | {
        "target": "The answer is 7.",
        "source": "rewrite",
        "reason": "ok",
    }
    assert choose_target(row("The answer is 8."), SELECTION, 0.0) == kept | {
        "target": REFERENCE,
        "source": "reference",
        "reason": "answer",
    }


def test_without_selection_every_text_is_taken() -> None:
    assert choose_target(row("The answer is 8.", "length"), None, 0.0)["target"] == "The answer is 8."
    empty = choose_target(row("  ", "length"), None, 0.0)
    assert (empty["target"], empty["source"], empty["reason"]) == (REFERENCE, "reference", "empty")


def test_gold_share_is_drawn_by_row() -> None:
    rows = [row("The answer is 7.", id=f"r{i}") for i in range(400)]
    few, more = (
        {r["id"] for r in rows if choose_target(r, SELECTION, s)["reason"] == "gold_share"} for s in (0.2, 0.5)
    )
    assert few < more
    assert 40 < len(few) < 120
    assert 150 < len(more) < 250
    assert not [r for r in rows if choose_target(r, SELECTION, 0.0)["source"] != "rewrite"]
    kept = [choose_target(r, SELECTION, 1.0) for r in rows]
    assert all(r["target"] == REFERENCE and r["source"] == "reference" for r in kept)
    assert {r["id"] for r in reversed(rows) if choose_target(r, SELECTION, 0.2)["reason"] == "gold_share"} == few


# ---- noise --------------------------------------------------------------------------------------------------------


def kept(count: int) -> list[dict[str, Any]]:
    """Rows with kept rewrites, and one whose rewrite was refused; every third answer is the same."""
    answers = [7 if number % 3 == 0 else 100 + number for number in range(count)]
    rows = [
        {"id": f"r{number}", "prompt": PROMPT, "reference": f"#### {answer}", "finish": "stop"}
        | {"rewrite": f"That makes {answer}. ({number})\nThe answer is {answer}."}
        for number, answer in enumerate(answers)
    ]
    rows.append({"id": "refused", "prompt": PROMPT, "reference": "#### 1", "rewrite": "", "finish": "stop"})
    return [choose_target(each, SELECTION, 0.0) for each in rows]


def noisy(rows: list[dict[str, Any]], share: float, selection: Selection = SELECTION) -> dict[str, dict[str, Any]]:
    found = list(with_noise(rows, share, lambda row: selection))
    assert [each["id"] for each in found] == [each["id"] for each in rows]
    return {each["id"]: each for each in found if each["reason"] == "noise"}


def test_noise_is_another_rows_rewrite_with_a_wrong_answer() -> None:
    rows = kept(60)
    texts = {each["target"]: each["id"] for each in rows}
    found = noisy(rows, 1.0)
    assert set(found) == {f"r{number}" for number in range(60)}, "what was refused stays a reference"
    for id, each in found.items():
        assert texts[each["target"]] not in (id, "refused")
        assert SELECTION.agrees(each["target"], each["reference"]) is False
        assert each["source"] == "rewrite"
        original = next(row for row in rows if row["id"] == id)
        assert each | {"target": "", "reason": ""} == original | {"target": "", "reason": ""}


def test_a_larger_share_of_noise_adds_to_a_smaller_one() -> None:
    rows = kept(400)
    few, more = noisy(rows, 0.1), noisy(rows, 0.3)
    assert 20 < len(few) < 65
    assert 90 < len(more) < 150
    assert few.items() <= more.items() <= noisy(rows, 1.0).items()
    assert noisy(rows, 0.0) == {}
    assert noisy(rows, 0.1) == few
    assert rows == kept(400), "the rows given are left alone"


def test_where_answers_cannot_be_compared_the_text_is_another() -> None:
    rows = kept(12)
    for id, each in noisy(rows, 1.0, Selection("none")).items():
        assert each["target"] != next(row["target"] for row in rows if row["id"] == id)
    alike = [each | {"id": f"a{number}"} for number, each in enumerate([rows[0]] * 3)]
    assert noisy(alike, 1.0) == {}, "no row has a wrong answer for another"


# ---- rewriting --------------------------------------------------------------------------------------------------


class FakeEngine:
    """Answers from a script {(id, attempt): (text, finish)}, in an order of its own; may lose completions."""

    def __init__(
        self, script: dict[tuple[str, int], tuple[str, str]], tries: int = 1, lost: Sequence[str] = ()
    ) -> None:
        self.script, self.tries, self.lost = script, tries, set(lost)
        self.asked: list[Request] = []

    def spec(self) -> dict[str, Any]:
        return {}

    def open(self, *_: Any) -> None: ...

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        self.asked += requests
        for request in reversed(requests):
            if request.id not in self.lost:
                yield Completion(request.id, *self.script[request.id, request.attempt])


def examples(*ids: str) -> list[Example]:
    return [Example(id, f"{PROMPT} ({id})", REFERENCE) for id in ids]


TEMPLATE = "{prompt} | {reference}"


def test_rows_keep_the_order_of_the_dataset_whatever_the_engine_does() -> None:
    names = [f"r{i}" for i in range(9)]
    engine = FakeEngine({(name, 0): (f"text of {name}", "stop") for name in names})
    rows = list(rewrite_rows(engine, examples(*names), TEMPLATE, Selection()))
    assert [r["id"] for r in rows] == names
    for name, found in zip(names, rows, strict=True):
        assert found == {
            "id": name,
            "prompt": f"{PROMPT} ({name})",
            "reference": REFERENCE,
            "rewrite": f"text of {name}",
            "finish": "stop",
        }
    assert [r.prompt for r in engine.asked] == [f"{PROMPT} ({name}) | {REFERENCE}" for name in names]


def test_a_lost_completion_stops_the_work_instead_of_shifting_rows() -> None:
    engine = FakeEngine({(name, 0): (f"text of {name}", "stop") for name in "abc"}, lost=["b"])
    with pytest.raises(KeyError, match="b"):
        list(rewrite_rows(engine, examples("a", "b", "c"), TEMPLATE, Selection()))


def test_tries_stop_at_the_first_that_passes() -> None:
    right, wrong = ("The answer is 7.", "stop"), ("The answer is 8.", "stop")
    script = {
        ("at once", 0): right,
        ("second", 0): wrong,
        ("second", 1): ("It comes to 7.\nThe answer is 7.", "stop"),
        ("never", 0): wrong,
        ("never", 1): ("The answer is 7.", "length"),
        ("never", 2): ("The answer is 9.", "stop"),
        ("long", 0): ("", "too_long"),
    }
    engine = FakeEngine(script, tries=3)
    rows = list(rewrite_rows(engine, examples("at once", "second", "never", "long"), TEMPLATE, SELECTION))
    assert [(r.id, r.attempt) for r in engine.asked] == [
        ("at once", 0),
        ("second", 0),
        ("never", 0),
        ("long", 0),
        ("second", 1),
        ("never", 1),
        ("never", 2),
    ]
    assert [(r["rewrite"], r["finish"]) for r in rows] == [
        right,
        ("It comes to 7.\nThe answer is 7.", "stop"),
        ("The answer is 9.", "stop"),
        ("", "too_long"),
    ]


def test_tries_end_once_every_row_has_passed() -> None:
    engine = FakeEngine({(name, 0): ("The answer is 7.", "stop") for name in "ab"}, tries=5)
    list(rewrite_rows(engine, examples("a", "b"), TEMPLATE, SELECTION))
    assert len(engine.asked) == 2


# ---- one of several ---------------------------------------------------------------------------------------------


class Tries:
    """Says what it is told to, a try after another; knows what it was asked."""

    tries = 4

    def __init__(self, *said: tuple[str, str]) -> None:
        self.said, self.asked = said, list[Request]()

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        for request in requests:
            self.asked.append(request)
            yield Completion(request.id, *self.said[request.attempt])


SAID = (("Seven it is, I think. The answer is 8.", "stop"), ("3 + 4 makes 7.\nThe answer is 7.", "stop"))
SAID += (("The answer is 7.", "stop"), ("ans: 7", "length"))


def test_without_a_selection_every_try_is_kept() -> None:
    before = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
    engine = Tries(*SAID)
    (written,) = rewrite_rows(engine, [Example("a", PROMPT, REFERENCE, before=before)], "{prompt}", None)
    assert written["before"] == list(before) and [request.before for request in engine.asked] == [before] * 4
    assert [(one["rewrite"], one["finish"]) for one in [written, *written["others"]]] == list(SAID)
    (first,) = rewrite_rows(Tries(*SAID), [Example("a", PROMPT, REFERENCE)], "{prompt}", SELECTION)
    assert (first["rewrite"], "others" in first, "before" in first) == (SAID[1][0], False, False)


def test_a_choice_is_among_the_rewrites_that_pass() -> None:
    (written,) = rewrite_rows(Tries(*SAID), [Example("a", PROMPT, REFERENCE)], "{prompt}", None)
    assert chosen(written, SELECTION, shortest)["rewrite"] == "The answer is 7."
    assert chosen(written, None, shortest)["rewrite"] == "ans: 7", "cut, but without selection any text will do"
    assert chosen(written, None, answer_correct(SELECTION, REFERENCE))["rewrite"] == SAID[1][0]
    target = choose_target(chosen(written, SELECTION, shortest), SELECTION, 0.0)
    assert (target["target"], target["source"], "others" in target) == ("The answer is 7.", "rewrite", False)
    none = choose_target(chosen(written, Selection("anywhere", ("the answer",)), shortest), SELECTION, 0.0)
    assert none["reason"] == "answer", "no try passes: the first one's reason stands"
    repeated = chosen(written | {"others": []}, None, shortest)
    assert repeated["rewrite"] == SAID[0][0]
