"""Passes whose parts are kept: one that was killed goes on, and ends with the same values to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdd.analysis.shift import token_nll
from sdd.evaluation import generation
from sdd.evaluation.backends import in_process
from sdd.evaluation.harness import Harness
from sdd.evaluation.tiny import suite_tasks
from sdd.forward import parts
from sdd.forward.parts import Parts, forget
from sdd.models.checkpoints import Checkpoint, decoder

ROWS = [(list(range(3, 5 + n)), list(range(40, 42 + n % 3))) for n in range(9)]


class Killed(BaseException):
    """What ends a process."""


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return Checkpoint(tiny_llama).model("float32")


def given(model: Any, tokenizer: Any, kept: Path | None) -> Any:
    return token_nll(model, ROWS, 2, kept=kept)


def evaluated(task: str) -> Callable[[Any, Any, Path | None], Any]:
    def run(model: Any, tokenizer: Any, kept: Path | None) -> Any:
        harness = Harness(in_process(model, tokenizer, 2), tokenizer, max_new_tokens=6)
        harness.kept = kept
        return harness.run(suite_tasks("tiny", [task], "dev", 0, 9)[task])

    return run


WAYS = {"given answers": given, **{task: evaluated(task) for task in ("arithmetic", "fact_choice", "nll")}}


@pytest.mark.parametrize("name", WAYS)
def test_killed_in_the_middle_then_run_again(
    name: str, model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed when half of it is written down, and what is left there is cut; damage and other files are no part
    of it. In the end no pass is needed, and what is forgotten is computed again."""
    monkeypatch.setattr(parts, "EVERY", 0.0)
    monkeypatch.setattr(generation, "BATCHES", 1)
    write, written, last, passes = Parts.write, [0], 0, [0]

    def writing(self: Parts) -> None:
        write(self)
        written[0] += 1
        if written[0] == last:
            raise Killed

    monkeypatch.setattr(Parts, "write", writing)
    decoder(model).register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def run(kept: Path | None) -> tuple[Any, int]:
        before = passes[0]
        return WAYS[name](model, tokenizer, kept), passes[0] - before

    kept = tmp_path / "kept"
    undisturbed, whole = run(None)
    written[0] = 0
    run(tmp_path / "kept.other")
    last, written[0] = written[0] // 2 + 1, 0
    with pytest.raises(Killed):
        run(kept)
    last = 0
    (file,) = tmp_path.glob("kept.0.parts")
    file.write_bytes(file.read_bytes()[:-3])
    resumed, left = run(kept)
    assert resumed == undisturbed
    assert 0 < left < whole
    assert run(kept) == (undisturbed, 0)
    forget(kept)
    assert [path.name for path in tmp_path.glob("*")] == ["kept.other.0.parts"]
    assert run(kept) == (undisturbed, whole)


@pytest.mark.parametrize("damage", ["cut", "changed", "link", "other"])
def test_only_whole_parts_of_the_same_pass_are_known(damage: str, tmp_path: Path) -> None:
    kept, file = tmp_path / "kept", tmp_path / "kept.0.parts"
    with Parts(kept, "this") as some:
        for part in ([1, 0.1], [2, float("inf")]):
            some.add(lambda part=part: part)
        some.write()
    assert list(Parts(kept, "this").known()) == [[1, 0.1], [2, float("inf")]]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "changed":
        file.write_bytes(file.read_bytes().replace(b"[2, ", b"[3, "))
    elif damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    left = list(Parts(kept, "that" if damage == "other" else "this").known())
    assert left == ([[1, 0.1]] if damage in ("cut", "changed") else [])
    with Parts(kept, "this") as some:
        some.add(lambda: [4, 0.4])
        some.write()
    assert list(Parts(kept, "this").known())[-1] == [4, 0.4]
    assert not (tmp_path / "elsewhere").exists() or b"[4, " not in (tmp_path / "elsewhere").read_bytes()
