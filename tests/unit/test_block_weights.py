"""Sums over a block's weights by hand, and Taylor scores against all gradients of one naive loss."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sdd.forward.batches import tokenize_texts
from sdd.forward.bypass import Row
from sdd.importance.weights import Magnitude, Taylor, magnitude, taylor
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint

BLOCKS = 4


@pytest.fixture(scope="module")
def rows(tokenizer: Any, conversations: list[str]) -> list[Row]:
    return [Row(ids) for ids in tokenize_texts(tokenizer, conversations, 48)]


def test_sums_by_hand() -> None:
    weight, gradient = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[2.0, 1.0], [-1.0, 5.0]])
    assert magnitude(weight) == 6.0
    assert taylor(weight, gradient) == 2.0 + 2.0 + 3.0
    assert taylor(weight.bfloat16(), gradient.bfloat16()) == 7.0
    assert magnitude(torch.full((3000,), 1.0, dtype=torch.bfloat16)) == 3000.0


@pytest.mark.parametrize("folder", ["tiny_llama", "sharded_llama"])
def test_magnitude_is_of_the_stored_parameters(folder: str, request: pytest.FixtureRequest) -> None:
    """One file or several: each block's tensors, wherever they lie; embeddings and head in none."""
    source: Path = request.getfixturevalue(folder)
    criterion = Magnitude()
    criterion.start(BLOCKS)
    criterion.read(Checkpoint(source))
    layers = checkpoints.blocks(Checkpoint(source).model("float32"))
    expected = [sum(float(p.detach().double().abs().sum()) for p in layer.parameters()) for layer in layers]
    scores = criterion.scores()
    assert scores["distance"]["1"] == pytest.approx(expected, rel=1e-9)
    assert scores["order"] == sorted(range(BLOCKS), key=expected.__getitem__)


def naive(model: Any, rows: list[Row]) -> list[float]:
    """|g * w| of the mean loss over all tokens, texts one by one without padding, gradients all kept."""
    tokens = sum(len(row.ids) - 1 for row in rows)
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids).logits[0, :-1]
        (torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum") / tokens).backward()
    return [
        sum(float((p.grad * p.detach()).abs().sum()) for p in layer.parameters() if p.grad is not None)
        for layer in checkpoints.blocks(model)
    ]


def measured(model: Any, rows: list[Row], batch_size: int, max_tokens: int = 16_384) -> dict[str, Any]:
    criterion = Taylor()
    criterion.start(BLOCKS)
    criterion.measure(model, rows, batch_size, max_tokens)
    scores: dict[str, Any] = criterion.scores()
    return scores


@pytest.mark.parametrize(("batch_size", "max_tokens"), [(7, 16_384), (3, 16_384), (7, 100), (1, 1)])
def test_taylor_is_the_naive_sum(batch_size: int, max_tokens: int, tiny_llama: Path, rows: list[Row]) -> None:
    """One batch or several: the absolute value is taken after the batches' gradients have been added."""
    expected = naive(Checkpoint(tiny_llama).model("float32"), rows)
    found = measured(Checkpoint(tiny_llama).model("float32"), rows, batch_size, max_tokens)
    assert found["distance"]["1"] == pytest.approx(expected, rel=1e-5)
    assert found["order"] == sorted(range(BLOCKS), key=expected.__getitem__)
    apart = [naive(Checkpoint(tiny_llama).model("float32"), [row]) for row in rows]
    assert sum(text[0] for text in apart) / len(rows) > 1.1 * expected[0], "the case cannot tell the two sums apart"


def test_gradients_of_one_batch_are_never_all_there(tiny_llama: Path, rows: list[Row]) -> None:
    """Counted as each one comes: no other weight has one; embeddings, final norm and head never get one."""
    model = Checkpoint(tiny_llama).model("float32")
    counts: list[int] = []
    for parameter in checkpoints.blocks(model).parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: counts.append(sum(p.grad is not None for p in model.parameters()))
        )
    measured(model, rows, batch_size=7)
    assert len(counts) == len(list(checkpoints.blocks(model).parameters()))
    assert max(counts) == 1
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any("forward" in vars(layer) for layer in checkpoints.blocks(model))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_a_block_that_does_nothing_has_no_gradient_worth_a_weight(
    block: int, tiny_llama: Path, rows: list[Row], tmp_path: Path
) -> None:
    model = Checkpoint(tiny_llama).model("float32")
    with torch.no_grad():
        checkpoints.blocks(model)[block].self_attn.o_proj.weight.zero_()
        checkpoints.blocks(model)[block].mlp.down_proj.weight.zero_()
    checkpoints.save_model(model, tmp_path, Checkpoint(tiny_llama))
    found = measured(model, rows, batch_size=7)
    assert found["distance"]["1"][block] == 0.0
    assert found["order"][0] == block
    criterion = Magnitude()
    criterion.start(BLOCKS)
    criterion.read(Checkpoint(tmp_path))
    assert criterion.scores()["order"][0] == block
