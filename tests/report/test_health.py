"""Health of generation: the formulas on answers made by hand, and a study whose averages hide what its answers are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sdd.report import write_report
from sdd.report.facts import facts_of
from sdd.report.health import calibration_error, confidence, flips, repeats, symptoms, words
from sdd.report.library import find_evaluated
from sdd.report.limits import cut_at

SENTENCE = "The cat sat on the mat. "


@pytest.fixture(autouse=True)
def tables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdd.report.plots.write_plots", lambda study, out: None)
    monkeypatch.setattr("sdd.report.page.write_page", lambda *parts: None)


@pytest.mark.parametrize(
    ("text", "is_endless"),
    [
        (f"First, {SENTENCE * 3}", True),
        (f"First, {SENTENCE * 3}The cat", True),
        (f"First, {SENTENCE * 2}The answer is 7.", False),
        (f"{SENTENCE * 5}The answer is 7.", False),
        ("x" * 60, True),
        ("no, no, no, no", False),
        ("哈" * 70, True),
        ("Step 1. Add. Step 2. Add. Step 3. Add. Step 4. Add. Step 5. Add. Step 6. Add.", False),
        ("", False),
    ],
)
def test_an_answer_that_ends_in_the_same_words_over_and_over(text, is_endless):
    assert repeats(text) is is_endless


def test_words_are_counted():
    assert words("It is 3, isn't it?") == 5
    assert words("") == 0


def test_flips_cancel_in_the_average():
    teacher, student = np.array([[1, 1, 0, 0]]), np.array([[1, 0, 1, 0], [0, 0, 0, 0]])
    broken, mended = flips(student, teacher)
    assert broken.tolist() == [[0, 1, 0, 0], [1, 1, 0, 0]]
    assert mended.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]
    assert (student - teacher == mended - broken).all()


def test_calibration_error_by_hand():
    """Two bins: 95% sure and right half the time, 55% sure and right half the time."""
    assert calibration_error([0.95, 0.95, 0.55, 0.55], [1, 0, 1, 0]) == pytest.approx((0.45 + 0.05) / 2)
    assert calibration_error([1.0, 1.0], [1, 1]) == 0
    assert calibration_error([0.2], [0], bins=1) == pytest.approx(0.2)
    assert confidence([np.log(0.7), np.log(0.2), np.log(0.1)]) == pytest.approx(0.7)
    assert confidence([-5000.0, -5000.0]) == 0.5


def span(mean: float, half: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"changes": {"repeated": span(0.06, 0.03)}}, ["repeated"]),
        ({"changes": {"repeated": span(0.06, 0.07)}}, []),  # could be chance
        ({"changes": {"cut": span(0.015, 0.005)}}, []),  # a trifle
        ({"changes": {"cut": span(0.06, 0.03)}, "items": 60}, []),  # fewer than five items
        ({"length": span(1.8, 0.2)}, ["longer"]),
        ({"length": span(0.5, 0.1)}, ["shorter"]),
        ({"length": span(1.6, 0.2)}, []),
        ({"flipped": [span(0.12, 0.03), span(0.11, 0.03)]}, ["flips"]),
        ({"flipped": [span(0.30, 0.03), span(0.01, 0.01)]}, []),  # the average shows it
    ],
)
def test_a_mark_is_neither_chance_nor_a_trifle(changed, named):
    facts = {"changes": {}, "items": 200, "length": None, "flipped": [], "scored": 200, **changed}
    assert symptoms(**facts) == named


def byte_tokenizer(folder: Path) -> None:
    """A token a word, of a vocabulary of two words."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "unknown": 1}, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_answers_at_the_token_limit_are_counted_anew(tmp_path):
    byte_tokenizer(tmp_path)
    are_cut = cut_at(10, tmp_path)
    assert are_cut(["a " * 10, "a " * 9, "a " * 7, "one long word that ends", ""]) == [True, True, False, False, False]
    assert cut_at(10, tmp_path / "none") is None
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    assert cut_at(10, tmp_path) is None


def write_answers(path: Path, response: Any, **more: Any) -> None:
    """Give every sample of an evaluation another response, by its number and score."""
    for file in (path / "samples").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if "response" in rows[0]:
            rows = [row | {"response": response(n, row["score"])} | more for n, row in enumerate(rows)]
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def hiding(artifacts: Any) -> Any:
    """Unpruned 90% right; one arm as good with every sixth answer a loop, one that flips, one that is only worse."""
    scores = [1] * 90 + [0] * 10
    spec = {"max_new_tokens": 96}

    def evaluated(model: str | None, values: list[int], answer: Any) -> None:
        path = artifacts.evaluated(model, {"add": values, "sort": values})
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"spec": manifest["spec"] | spec}))
        write_answers(path, answer, malformed=0.0)

    pruned = artifacts.pruned(4)
    byte_tokenizer(artifacts.root / "pruned" / pruned)
    evaluated(None, scores, lambda n, score: "It is 7.")
    evaluated(pruned, [0] * 80 + [1] * 20, lambda n, score: "It is 7.")
    loops = artifacts.tuned(pruned, artifacts.targets("sft"), 0)
    evaluated(loops, scores, lambda n, score: "7. " + "a b " * 60 if n % 6 == 0 else "It is 7.")
    flipping = artifacts.tuned(pruned, artifacts.targets("self_distill"), 0)
    evaluated(flipping, [0] * 10 + [1] * 90, lambda n, score: "It is 7.")
    return artifacts


def test_what_averages_hide_is_marked_and_what_they_show_is_not(hiding, tmp_path):
    write_report(find_evaluated(hiding.root), hiding.root, tmp_path)
    health = {record["arm"]: record for record in json.loads((tmp_path / "health.json").read_text())["arms"]}
    assert health["sft"]["repeated"]["mean"] == health["sft"]["cut"]["mean"] == pytest.approx(17 / 100)
    assert health["sft"]["changes"]["cut"]["low"] > 0.05
    assert health["sft"]["flips"]["right_to_wrong"]["mean"] == 0
    assert health["self_distill"]["flips"]["right_to_wrong"]["mean"] == pytest.approx(0.1)
    assert health["self_distill"]["flips"]["wrong_to_right"]["mean"] == pytest.approx(0.1)
    assert health["teacher"]["flips"] is health["teacher"]["changes"] is None
    marks = {arm: (record["symptoms"], record["hidden"]) for arm, record in health.items()}
    assert marks["teacher"] == ([], False)
    assert marks["pruned"] == (["flips"], False)
    assert marks["sft"] == (["repeated", "cut", "longer"], True)
    assert marks["self_distill"] == (["flips"], True)
    table, own = (tmp_path / "table.md").read_text(), (tmp_path / "health.md").read_text()
    assert "hidden damage" in table and "repeated, cut, longer" in table
    assert "- sft hides damage behind its average: 17.0 [" in table
    assert "- Read the answers of sft, self_distill side by side" in table
    assert "pass@1 against pass@k is absent" in own
    assert "| sft " in own and "17.0 [" in own


def test_choices_have_a_calibration_error_and_no_length(artifacts, tmp_path):
    """90% sure of the first of two choices, which is right in half of the items."""
    path = artifacts.evaluated(None, {"pick_choice": [1, 0] * 20})
    file = path / "samples" / "pick_choice.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    nats = [float(np.log(0.9)), float(np.log(0.1))]
    file.write_text("".join(json.dumps(row | {"log_likelihoods": nats}) + "\n" for row in rows))
    write_report([path], artifacts.root, tmp_path)
    (record,) = json.loads((tmp_path / "health.json").read_text())["arms"]
    assert record["calibration"]["error"] == pytest.approx(0.4)
    assert (record["calibration"]["confidence"], record["calibration"]["choices"]) == (pytest.approx(0.9), 40)
    assert record["words"] is record["repeated"] is record["cut"] is None


def test_several_answers_to_an_item_count_as_one_and_given_answers_not_at_all():
    rows: list[dict[str, Any]] = [
        {"id": "several", "score": 1.0, "response": ["one two", "la " * 40], "malformed": True},
        {"id": "choice", "score": 0.5, "response": "b", "log_likelihoods": [-1.0, -1.0], "metrics": {"acc,none": 1.0}},
        {"id": "given", "score": 0.3, "response": "given", "log_likelihood": -3.0},
    ]
    several, choice, given = facts_of(rows, lambda texts: [len(text) > 20 for text in texts])
    assert several == {"score": 1, "answers": 2, "words": 21, "repeated": 0.5, "malformed": 1, "cut": 0.5}
    assert choice == {"confidence": 0.5, "right": 1}
    assert given == {}
