"""What the embedded model is asked, and that none of it was seen before."""

from collections import Counter

import pytest

from sdd.data.tiny import TinyTasks, TinyTexts
from sdd.errors import UserError
from sdd.evaluation.tiny import CHOICES, suite_tasks
from sdd.tiny.tasks import FAMILIES, WORLD, WORLD_VALUES, instances, split_of, stated


def test_tasks_and_their_kinds() -> None:
    tasks = suite_tasks("tiny", None, "dev", 0, 5)
    assert list(tasks) == [*FAMILIES, "fact_choice", "nll"]
    assert Counter(task.kind for task in tasks.values()) == {"free": 8, "choice": 1, "likelihood": 1}
    for name, task in tasks.items():
        assert task.name == name
        assert len(task.items) == len({item.id for item in task.items}) == 5
        assert all(bool(item.choices) == (task.kind == "choice") for item in task.items)
        assert all((item.gold is not None) == (task.kind == "likelihood") for item in task.items)
    assert list(suite_tasks("tiny", ["nll", "sort"], "dev", 0, 2)) == ["nll", "sort"]


def test_choices_are_four_statements_of_which_one_is_right() -> None:
    (task,) = suite_tasks("tiny", ["fact_choice"], "test", 0, 150).values()
    places: Counter[int] = Counter()
    tasks = {drawn.id: drawn for drawn in instances("test", 1_000, 150, ["fact"])}
    for item in task.items:
        assert len(set(item.choices)) == len(item.choices) == CHOICES == 4
        places[item.choices.index(item.answer)] += 1
        facts = [tuple(part.split()) for part in tasks[item.id].key.removeprefix("fact ").split(", ")]
        if " ".join(WORLD[who, what] for who, what in facts) != tasks[item.id].answer:
            facts.reverse()
        possible = {
            f"{stated(*facts[0], a)} {stated(*facts[1], b)}": (a, b)
            for a in WORLD_VALUES[facts[0][1]]
            for b in WORLD_VALUES[facts[1][1]]
        }
        true = tuple(WORLD[who, what] for who, what in facts)
        assert possible[item.answer] == true
        for choice in item.choices:
            differ = sum(value != right for value, right in zip(possible[choice], true, strict=True))
            assert differ == (choice != item.answer)
    assert min(places[place] for place in range(4)) > 15, "the place of the right choice gives nothing away"


@pytest.mark.parametrize("split", ["dev", "test"])
def test_nothing_asked_was_trained_on_or_measured_with(split: str) -> None:
    seen = TinyTasks(num_rows=1500).examples() + TinyTasks(num_rows=500, seed=1).examples()
    seen_ids, seen_prompts = {e.id for e in seen}, {e.prompt for e in seen}
    texts = "\n".join(TinyTexts(128).texts())
    for seed in (0, 1):
        for task in suite_tasks("tiny", None, split, seed, 40).values():
            assert not {item.id for item in task.items} & seen_ids
            assert not {item.prompt for item in task.items} & seen_prompts
            assert not any(item.prompt in texts for item in task.items)


def test_items_belong_to_their_split_and_are_decided_by_the_seed() -> None:
    for split in ("dev", "test"):
        keys = {task.id: task.key for family in FAMILIES for task in instances(split, 3, 20, [family])}
        for name in FAMILIES:
            (task,) = suite_tasks("tiny", [name], split, 3, 20).values()
            assert all(split_of(keys[item.id]) == split for item in task.items)
    assert suite_tasks("tiny", None, "dev", 3, 5) == suite_tasks("tiny", None, "dev", 3, 5)
    assert suite_tasks("tiny", ["sort"], "dev", 3, 5) != suite_tasks("tiny", ["sort"], "dev", 4, 5)
    shorter, longer = (suite_tasks("tiny", ["sort"], "dev", 3, n)["sort"].items for n in (5, 9))
    assert longer[:5] == shorter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("glue", None, "dev", 0, 5), r"evaluation\.suite=glue is unknown"),
        (("tiny", None, "teacher", 0, 5), r"evaluation\.split=teacher is no evaluation split; choose dev or test"),
        (("tiny", ["poetry"], "dev", 0, 5), r"evaluation\.tasks: poetry is unknown; choose from word"),
    ],
)
def test_wrong_settings_are_named(arguments: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        suite_tasks(*arguments)


def test_more_items_than_a_split_holds_are_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdd.tiny import tasks

    (one,) = instances("dev", 0, 1, ["sort"])
    monkeypatch.setitem(tasks.FAMILIES, "sort", lambda rng: one)
    with pytest.raises(UserError, match=r"evaluation\.limit=2: the dev split has no 2 distinct 'sort' instances"):
        suite_tasks("tiny", ["sort"], "dev", 0, 2)
