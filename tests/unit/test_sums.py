"""Sums over texts: a pass that was killed in the middle goes on, and ends with the same numbers to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdd.forward import sums
from sdd.forward.batches import length_batches, show_texts, tokenize_texts
from sdd.forward.bypass import Row
from sdd.importance.channels import SDM, ActivationWidth, TaylorWidth
from sdd.importance.criteria import BlockCriterion, StateCriterion
from sdd.importance.removal import Perplexity, iterative
from sdd.importance.states import Angular, BlockInfluence
from sdd.models.checkpoints import Checkpoint, decoder

BLOCKS, TOKENS = 4, 100
CRITERIA = {
    "angular": Angular,
    "block_influence": BlockInfluence,
    "perplexity": Perplexity,
    "iterative": lambda: iterative("angular", depth=3),
    "greedy": lambda: iterative("perplexity", depth=2),
    "activation_width": ActivationWidth,
    "taylor_width": TaylorWidth,
    "sdm": lambda: SDM(0.1, alpha=0.4, temperature=0.5),
}


class Killed(BaseException):
    """What ends a process."""


@pytest.fixture(scope="module")
def rows(tokenizer: Any, conversations: list[str]) -> list[list[int]]:
    ids = tokenize_texts(tokenizer, conversations, 48)
    assert len(length_batches([len(row) for row in ids], 2, TOKENS)) > 3
    return ids


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return Checkpoint(tiny_llama).model("float32")


def scored(name: str, model: Any, rows: list[list[int]], scratch: Path | None) -> tuple[Any, int]:
    """What a criterion comes to, in batches of two texts, and how many passes of the model that takes."""
    criterion: Any = CRITERIA[name]()
    criterion.scratch = scratch
    passes = [0]
    handle = decoder(model).register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    try:
        if isinstance(criterion, BlockCriterion):
            criterion.start(BLOCKS)
        if isinstance(criterion, StateCriterion):
            show_texts(model, criterion, rows, 2, kept=criterion.kept("scores"))
        elif isinstance(criterion, BlockCriterion):
            criterion.measure(model, [Row(ids) for ids in rows], 2)
        else:
            first = [[torch.arange(48.0)] * BLOCKS] if name == "sdm" else []
            return [vector.tolist() for vector in criterion.measure(model, rows, TOKENS, *first)], passes[0]
        return criterion.scores(), passes[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("name", CRITERIA)
def test_killed_in_the_middle_then_run_again(
    name: str, model: Any, rows: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed after its last but one time of writing; what was there of other texts is not gone on from."""
    monkeypatch.setattr(sums, "EVERY", 0.0)
    write, written = sums._write, [0]

    def writing(*arguments: Any) -> None:
        write(*arguments)
        written[0] += 1
        if written[0] == last:
            raise Killed

    monkeypatch.setattr(sums, "_write", writing)
    last = 0
    undisturbed, passes = scored(name, model, rows, None)
    scored(name, model, rows[2:], tmp_path)
    last, written[0] = written[0] - 1, 0
    with pytest.raises(Killed):
        scored(name, model, rows, tmp_path)
    last = 0
    resumed, left = scored(name, model, rows, tmp_path)
    assert resumed == undisturbed
    assert 0 < left < passes / 2 + 2
    assert scored(name, model, rows, tmp_path)[0] == undisturbed


@pytest.mark.parametrize("damage", ["cut", "link", "other"])
def test_damaged_sums_are_begun_anew(damage: str, tmp_path: Path) -> None:
    from tqdm import tqdm

    seen: list[list[int]] = []

    def of(batch: list[int]) -> sums.Sums:
        seen.append(batch)
        return {"rows": torch.tensor([float(len(batch))])}

    kept, batches = tmp_path / "kept.safetensors", [[0, 1], [2]]
    sums.over(batches, of, tqdm(total=3, disable=True), kept, "this")
    if damage == "cut":
        kept.write_bytes(kept.read_bytes()[:-1])
    elif damage == "link":
        kept.rename(tmp_path / "elsewhere")
        kept.symlink_to(tmp_path / "elsewhere")
    seen.clear()
    what = "that" if damage == "other" else "this"
    assert sums.over(batches, of, tqdm(total=3, disable=True), kept, what) == {"rows": torch.tensor([3.0])}
    assert seen == batches
