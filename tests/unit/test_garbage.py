"""When dead objects are looked for, in a process of a command and in any other."""

import gc
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakSet

import pytest

from sdd.models import checkpoints, garbage
from sdd.models.checkpoints import Checkpoint


@pytest.fixture(autouse=True)
def nobodys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which no command has run; afterwards all is as it was, but for what is passed over."""
    before = gc.get_threshold()
    monkeypatch.setattr(garbage, "_usual", None)
    monkeypatch.setattr(garbage, "_passed_over", 0)
    monkeypatch.setattr(checkpoints, "opened", WeakSet())
    gc.set_threshold(701, 11, 12)
    yield
    gc.set_threshold(*before)


def test_a_command_looks_rarely_until_a_model_is_open(tiny_llama: Path) -> None:
    garbage.look_rarely()
    assert gc.get_threshold() == (garbage.NEW, 11, 12)
    frozen = gc.get_freeze_count()
    held = [[] for _ in range(1_000)]
    Checkpoint(tiny_llama).model("float32")
    assert gc.get_threshold() == (701, 11, 12)
    assert gc.get_freeze_count() >= frozen + len(held), "what lived is passed over"
    garbage.look_rarely()
    assert gc.get_threshold() == (garbage.NEW, 11, 12), "the next job composes and imports"
    garbage.look_as_usual()
    assert gc.get_threshold() == (701, 11, 12)


def test_what_lives_is_passed_over_once_for_the_same_modules() -> None:
    garbage.look_rarely()
    garbage.pass_over_modules()
    frozen, held = gc.get_freeze_count(), [[] for _ in range(1_000)]
    garbage.pass_over_modules()
    assert gc.get_freeze_count() < frozen + len(held)


def test_processes_of_others_stay_as_they_are(tiny_llama: Path) -> None:
    frozen, held = gc.get_freeze_count(), [[] for _ in range(1_000)]
    Checkpoint(tiny_llama).model("float32")
    assert gc.get_threshold() == (701, 11, 12)
    assert gc.get_freeze_count() < frozen + len(held)
