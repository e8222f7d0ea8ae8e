"""The embedded tasks: splits that share nothing, answers that are true, and draws that can be repeated."""

import json
import random
import re
import subprocess
import sys
from itertools import combinations

import pytest

from sdd import answers
from sdd.data.tiny import CALIBRATION_SEED
from sdd.tiny.paraphrases import paraphrased
from sdd.tiny.registers import REGISTERS, reference_of
from sdd.tiny.tasks import (
    BUCKETS,
    FAMILIES,
    PLENTY,
    SPLITS,
    WORLD,
    Instance,
    _chain,
    _chain_key,
    _chain_keys,
    _fact_key,
    available,
    check_available,
    draw,
    instances,
    main,
    split_of,
)

DRAWS = {"teacher": 4000, "pool": 3000, "dev": 1000, "test": 1500}
SEEDS = (0, 1, 17)


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Instance]]:
    """Several thousand instances of every family mixture and split, over several seeds."""
    return {
        split: [task for seed in SEEDS for task in instances(split, seed, n // len(SEEDS))]
        for split, n in DRAWS.items()
    }


def test_buckets_are_shared_out_once() -> None:
    owned = [bucket for buckets in SPLITS.values() for bucket in buckets]
    assert sorted(owned) == list(range(BUCKETS))


@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_splits_share_no_instance_and_no_prompt(one: str, other: str, drawn: dict[str, list[Instance]]) -> None:
    a, b = drawn[one], drawn[other]
    assert not {task.key for task in a} & {task.key for task in b}
    assert not {task.prompt for task in a} & {task.prompt for task in b}
    assert not {task.id for task in a} & {task.id for task in b}


def test_a_word_problem_and_its_bare_expression_share_a_split() -> None:
    rng = random.Random(0)
    word_keys = {draw("word", "test", rng).key for _ in range(300)}
    bare = [FAMILIES["arithmetic"](rng) for _ in range(3000)]
    assert all(task.key.startswith("chain ") for task in bare)
    assert all(split_of(key) == "test" for key in word_keys)
    expressions = {"chain " + re.sub(r"^.*?(?=\d)|\?$", "", task.prompt): task.key for task in bare}
    assert all(read == key for read, key in expressions.items()), "the key is the expression itself"


def test_every_family_reaches_every_split(drawn: dict[str, list[Instance]]) -> None:
    for tasks in drawn.values():
        assert {task.family for task in tasks} == set(FAMILIES)


def test_equal_keys_have_equal_answers(drawn: dict[str, list[Instance]]) -> None:
    known: dict[str, str] = {}
    for tasks in drawn.values():
        for task in tasks:
            answer = " ".join(sorted(task.answer.split())) if task.family == "fact" else task.answer
            assert known.setdefault(task.key, answer) == answer, "two facts may be asked in either order"


def test_both_registers_state_the_answer(drawn: dict[str, list[Instance]]) -> None:
    for tasks in drawn.values():
        for task in tasks:
            for text in (task.gold, task.reference):
                for rule in ("final", "anywhere"):
                    found = answers.extract(text, rule)
                    assert found is not None, text
                    assert answers.equal(found, task.answer), (text, task.answer)
            assert task.gold.endswith(f"\nThe answer is {task.answer}.")
            assert not task.reference.endswith(".")


def test_every_register_and_paraphrase_states_the_answer(drawn: dict[str, list[Instance]]) -> None:
    rng = random.Random(0)
    for task in drawn["pool"][:400]:
        texts = {reference_of(task, register, share) for register in REGISTERS for share in (0, 0.5, 1)}
        texts |= {paraphrased(task, rng) for _ in range(4)}
        for text in texts:
            assert answers.equal(answers.extract(text, "anywhere") or "", task.answer), text
        assert reference_of(task) == task.reference
        assert reference_of(task, "medium", 0) == task.reference.split("\n")[-1]
        assert STEP.findall(reference_of(task, "strong")) == STEP.findall(task.reference)


def test_registers_stand_apart_and_paraphrases_differ(drawn: dict[str, list[Instance]]) -> None:
    words: dict[str, set[str]] = {register: set() for register in ("own", *REGISTERS)}
    for task in drawn["pool"][:400]:
        words["own"] |= set(task.gold.lower().split())
        for register in REGISTERS:
            words[register] |= set(reference_of(task, register).lower().split())
    beyond = [len(words[register] - words["own"]) for register in REGISTERS]
    assert beyond == sorted(beyond) and beyond[0] < beyond[1] < beyond[2], "each dial setting says more new words"
    task, rng = drawn["pool"][0], random.Random(1)
    assert len({paraphrased(task, rng) for _ in range(50)}) > 10


STEP = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")


def test_worked_steps_are_true_and_lead_to_the_answer(drawn: dict[str, list[Instance]]) -> None:
    operate = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    checked = 0
    for task in (task for tasks in drawn.values() for task in tasks if task.family in ("word", "arithmetic")):
        for text in (task.gold, task.reference):
            steps = STEP.findall(text)
            assert len(steps) in (2, 3)
            value = task.key.split()[1]
            for a, operator, b, c in steps:
                assert a == value, text
                assert operate[operator](int(a), int(b)) == int(c) >= 0, text
                value = c
            assert value == task.answer, text
            assert task.key == f"chain {steps[0][0]}" + "".join(f" {op} {b}" for _, op, b, _ in steps)
        checked += 1
    assert checked > 1000


def test_answers_of_the_other_families_are_right(drawn: dict[str, list[Instance]]) -> None:
    for task in (task for tasks in drawn.values() for task in tasks):
        given = task.key.removeprefix(f"{task.family} ")
        if task.family == "sort":
            assert task.answer == " ".join(sorted(given.split()))
        elif task.family == "reverse":
            assert task.answer == " ".join(given.split()[::-1])
        elif task.family == "shift":
            assert task.answer == " ".join(chr(ord(letter) + 1) for letter in given.split())
        elif task.family == "rotate":
            end, *words = given.split()
            assert task.answer.split() == (words[1:] + words[:1] if end == "first" else words[-1:] + words[:-1])
        elif task.family == "initials":
            assert task.answer == re.sub(r"\B\w", "", given)
        elif task.family == "fact":
            pairs = [tuple(part.split()) for part in given.split(", ")]
            assert pairs == sorted(pairs), "asked in the other order, it is the same task"
            in_order = [WORLD[pair] for pair in sorted(pairs, key=lambda pair: task.prompt.index(_asked(*pair)))]
            assert task.answer == " ".join(in_order)


def _asked(who: str, what: str) -> str:
    if what == "colour":
        return f"colour is the {who}"
    return f"the {who} " + {"food": "eat", "home": "live", "sound": "make"}[what]


@pytest.mark.parametrize("split", list(SPLITS))
def test_draws_repeat_and_longer_ones_begin_alike(split: str) -> None:
    longer = list(instances(split, 5, 60))
    assert list(instances(split, 5, 60)) == longer
    assert list(instances(split, 5, 23)) == longer[:23]
    assert list(instances(split, 6, 23)) != longer[:23]
    assert len({(task.family, task.key) for task in longer}) == 60
    assert [task.family for task in longer[:8]] == list(FAMILIES)


def test_draws_do_not_depend_on_the_process() -> None:
    """Sets and hashes of strings differ between processes; instances must not."""
    code = "from sdd.tiny.tasks import instances; print([t.prompt for t in instances('test', 3, 16)])"
    command = [sys.executable, "-c", code]
    outputs = {
        subprocess.run(
            command, env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{[task.prompt for task in instances('test', 3, 16)]}\n".encode()}


def test_calibration_draws_apart_from_fine_tuning() -> None:
    assert CALIBRATION_SEED not in range(10_000)
    assert list(instances("pool", CALIBRATION_SEED, 8)) != list(instances("pool", 0, 8))


@pytest.mark.parametrize(
    ("split", "families", "message"),
    [("train", None, "unknown split 'train'; choose one of teacher"), ("pool", ["poetry"], "unknown family 'poetry'")],
)
def test_unknown_names_are_refused(split: str, families: list[str] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(instances(split, 0, 1, families))


def test_more_instances_than_there_are_is_told_at_once() -> None:
    """What is counted is what can be drawn; below PLENTY nothing needs counting."""
    for split, plenty in PLENTY.items():
        assert plenty <= min(available(split, family) for family in FAMILIES)
    facts = available("pool", "fact")
    assert facts == sum(split_of(_fact_key(pair)) == "pool" for pair in combinations(sorted(WORLD), 2))
    rng = random.Random(0)
    assert {_chain_key(*_chain(rng)) for _ in range(2_000)} <= _chain_keys()
    check_available("pool", 8 * facts, list(FAMILIES))
    with pytest.raises(ValueError, match=f"but the pool split has {8 * facts:,} of these families"):
        next(instances("pool", 0, 8 * facts + 1))


def test_the_command_prints_four_keys_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--split", "test", "--seed", "7", "--n", "10"])
    lines = capsys.readouterr().out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 10
    assert all(list(row) == ["family", "prompt", "answer", "reference"] for row in rows)
    expected = [
        {"family": t.family, "prompt": t.prompt, "answer": t.answer, "reference": t.reference}
        for t in instances("test", 7, 10)
    ]
    assert rows == expected
    main(["--split", "dev", "--n", "3", "--family", "sort"])
    assert [json.loads(line)["family"] for line in capsys.readouterr().out.splitlines()] == ["sort"] * 3
    with pytest.raises(SystemExit):
        main(["--split", "train"])
