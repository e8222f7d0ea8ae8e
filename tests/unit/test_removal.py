"""Criteria that remove blocks and measure again, against the same removals made one by one on models of their own."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sdd.errors import UserError
from sdd.forward.batches import tokenize_texts
from sdd.forward.bypass import Bypass, Row, likelihoods, task_row
from sdd.importance.removal import Perplexity, iterative, without_each
from sdd.importance.states import chosen_blocks
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint
from sdd.pruning.depth import prune_checkpoint

BLOCKS = 4


@pytest.fixture(scope="module")
def rows(tokenizer: Any, conversations: list[str]) -> list[Row]:
    return [Row(ids) for ids in tokenize_texts(tokenizer, conversations, 48)]


def silence(model: Any, *blocks: int) -> Any:
    with torch.no_grad():
        for block in blocks:
            checkpoints.blocks(model)[block].self_attn.o_proj.weight.zero_()
            checkpoints.blocks(model)[block].mlp.down_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def nats_without(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> Callable[..., float]:
    """Mean cross-entropy of the pruned checkpoint, one text at a time, from stock code's logits in float64."""

    @cache
    def function(*removed: int) -> float:
        folder = tmp_path_factory.mktemp("pruned")
        prune_checkpoint(Checkpoint(tiny_llama), folder, list(removed))
        model = Checkpoint(folder).model("float32")
        nats = [0.0]
        for row in rows:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1].double()
            chosen = logits.log_softmax(-1)[torch.arange(len(row.ids) - 1), torch.tensor(row.ids[1:])]
            nats.append(-float(chosen.sum()))
        return math.fsum(nats) / sum(len(row.ids) - 1 for row in rows)

    return function


# ---- the likelihood of rows -------------------------------------------------------------------------------------


class Spelled:
    """A head that says the ids it is told, and how surely: logits of a state are its entries."""

    class config:
        model_type = "spelled"
        vocab_size = 4

    def get_output_embeddings(self) -> Any:
        return lambda hidden: hidden


def test_likelihoods_by_hand() -> None:
    """Two rows of 3 and 2 tokens; the state before a token holds its logits, all zero or sure of token 2."""
    even, sure = [0.0] * 4, [0.0, 0.0, 100.0, 0.0]
    hidden = torch.tensor([[sure, even, even], [even, sure, even]])
    spelled: Any = Spelled()
    first, second = Row([1, 2, 3]), Row([0, 3])
    assert likelihoods(spelled, hidden, [first, second]) == (pytest.approx(2 * math.log(4)), 3, 0, 2)
    only_2 = Row([1, 2, 3], answer=(1, 2))
    assert likelihoods(spelled, hidden, [only_2, second]) == (pytest.approx(2 * math.log(4)), 3, 1, 2)
    assert likelihoods(spelled, hidden, [Row([1, 2, 3], first=2)]) == (pytest.approx(math.log(4)), 1, 0, 1)


def test_the_answer_is_found_where_it_stands_last(tokenizer: Any) -> None:
    row = task_row(tokenizer, "What is 17 - 10?", "7 is close\n17 - 10 = 7 so\nans: 7", "7", None)
    assert row.answer is not None
    start, end = row.answer
    assert tokenizer.decode(row.ids[start:end]).strip() == "7"
    assert tokenizer.decode(row.ids[row.first : start]).endswith("ans:") or "7" not in tokenizer.decode(row.ids[end:])
    assert row.first < start < end < len(row.ids)
    words = task_row(tokenizer, "Reverse: b a", "#### a b", "a b", None)
    assert words.answer is not None
    assert "a b" in tokenizer.decode(words.ids[slice(*words.answer)])
    for missing in ("8", "", None):
        whole = task_row(tokenizer, "What is 17 - 10?", "ans: 7", missing, None)
        assert whole.answer is None


# ---- blocks passed over -----------------------------------------------------------------------------------------


def test_a_table_without_each_block_is_that_of_pruned_checkpoints(
    tiny_llama: Path, rows: list[Row], nats_without: Callable[..., float]
) -> None:
    """Batches of several lengths, one block gone already: what is skipped and what is kept is the same model."""
    model = Checkpoint(tiny_llama).model("float32")
    for removed in ([], [2]):
        whole, each = without_each(model, rows, removed, batch_size=3)
        assert whole.log_perplexity == pytest.approx(nats_without(*removed), rel=1e-5)
        assert sorted(each) == [block for block in range(BLOCKS) if block not in removed]
        for block, quality in each.items():
            assert quality.log_perplexity == pytest.approx(nats_without(*sorted({block, *removed})), rel=1e-5)
            assert (quality.rows, quality.tokens) == (len(rows), sum(len(row.ids) - 1 for row in rows))


def test_blocks_before_a_removal_are_not_run_again(tiny_llama: Path, rows: list[Row]) -> None:
    """Every block runs for a first look at one token and for the whole, and once for each removal before it."""
    model = Checkpoint(tiny_llama).model("float32")
    ran: list[int] = []
    for block, layer in enumerate(checkpoints.blocks(model)):
        layer.mlp.register_forward_hook(lambda *_, block=block: ran.append(block))
    without_each(model, rows[:2], [], batch_size=2)
    assert [ran.count(block) for block in range(BLOCKS)] == [2, 3, 4, 5]


def test_the_model_is_left_as_it_was_even_after_a_failure(tiny_llama: Path, rows: list[Row]) -> None:
    model = Checkpoint(tiny_llama).model("float32")
    bypass = Bypass(model)
    with pytest.raises(RuntimeError, match="stop"), bypass.letting_through({1: None}), bypass.catching([0]):
        raise RuntimeError("stop")
    for layer in checkpoints.blocks(model):
        assert "forward" not in vars(layer)
        assert not layer._forward_pre_hooks and not layer._forward_hooks


# ---- criteria ---------------------------------------------------------------------------------------------------


def measured(criterion: Any, model: Any, rows: list[Row], batch_size: int = 3) -> dict[str, Any]:
    criterion.start(BLOCKS)
    criterion.measure(model, rows, batch_size)
    scores: dict[str, Any] = criterion.scores()
    return scores


def test_perplexity_is_the_rise_when_a_block_alone_goes(
    tiny_llama: Path, rows: list[Row], nats_without: Callable[..., float]
) -> None:
    scores = measured(Perplexity(), Checkpoint(tiny_llama).model("float32"), rows)
    rises = [nats_without(block) - nats_without() for block in range(BLOCKS)]
    assert scores["distance"]["1"] == pytest.approx(rises, abs=1e-5)
    assert scores["order"] == sorted(range(BLOCKS), key=rises.__getitem__)
    assert scores["unpruned"]["log_perplexity"] == pytest.approx(nats_without(), rel=1e-5)


def test_greedy_measures_what_is_left_again(
    tiny_llama: Path, rows: list[Row], nats_without: Callable[..., float]
) -> None:
    scores = measured(iterative("perplexity"), Checkpoint(tiny_llama).model("float32"), rows)
    removed: list[int] = []
    for step in scores["steps"]:
        before, left = nats_without(*sorted(removed)), [b for b in range(BLOCKS) if b not in removed]
        expected = {block: nats_without(*sorted({block, *removed})) - before for block in left}
        assert [step["scores"][block] for block in left] == pytest.approx(list(expected.values()), abs=1e-5)
        assert all(step["scores"][block] is None for block in removed)
        removed.append(min(left, key=expected.__getitem__))
        assert step["removed"] == removed[-1]
    assert scores["order"] == removed and len(removed) == BLOCKS - 1
    blocks, score = chosen_blocks(scores, 2)
    assert blocks == sorted(removed[:2])
    assert score == pytest.approx(nats_without(*blocks) - nats_without(), abs=1e-5)


@pytest.mark.parametrize("by", ["angular", "perplexity", "task"])
def test_blocks_that_do_nothing_go_first_and_depth_ends_it(by: str, tiny_llama: Path, rows: list[Row]) -> None:
    model = silence(Checkpoint(tiny_llama).model("float32"), 1, 3)
    scores = measured(iterative(by, depth=2), model, rows)
    assert len(scores["steps"]) == 2
    if by == "task":  # of a random model nothing is right, so that likelihood alone decides, and others may help
        assert scores["steps"][0]["scores"] == [0.0] * BLOCKS
        rises = scores["steps"][0]["log_perplexity"]
        assert scores["order"][0] == rises.index(min(rises))
        assert (rises[1], rises[3]) == pytest.approx((0.0, 0.0), abs=1e-6)
    elif by == "angular":
        assert sorted(scores["order"]) == [1, 3]
        assert scores["steps"][1]["scores"][scores["order"][0]] is None
        assert chosen_blocks(scores, 2)[1] == pytest.approx(0.0, abs=1e-6)
    else:
        found = scores["steps"][0]["scores"]
        assert (found[1], found[3]) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_a_task_counts_answers_before_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block 0 loses an answer, 1 and 2 lose none, and 2 keeps the likelihood better."""
    from sdd.importance import removal

    whole = removal.Quality(10.0, 10, 4, 8)
    each = {0: removal.Quality(5.0, 10, 3, 8), 1: removal.Quality(30.0, 10, 4, 8), 2: removal.Quality(20.0, 10, 4, 8)}
    monkeypatch.setattr(removal, "without_each", lambda *_, **__: (whole, each))
    criterion = iterative("task", depth=1)
    criterion.start(3)
    criterion.measure(None, [], 1)
    (step,) = criterion.scores()["steps"]
    assert step == {"removed": 2, "scores": [1 / 8, 0.0, 0.0], "log_perplexity": [-0.5, 2.0, 1.0]}


def test_an_unknown_measure_is_named() -> None:
    with pytest.raises(UserError, match=r"metric\.by=accuracy is unknown; choose one of angular, perplexity, task"):
        iterative(by="accuracy")


def test_likelihoods_that_are_no_numbers_are_refused(tiny_llama: Path, rows: list[Row]) -> None:
    model = Checkpoint(tiny_llama).model("float32")
    with torch.no_grad():
        checkpoints.blocks(model)[2].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(UserError, match=r"not finite; choose model\.dtype=float32"):
        without_each(model, rows[:1], [], batch_size=1)


def test_runs_are_the_passes_that_are_made() -> None:
    """One pass of 3 blocks and 0, 1, 2 blocks behind each that goes; then 2 blocks the same way."""
    assert Perplexity().runs(3) == (3 + 3, 4)
    assert iterative("perplexity").runs(3) == (3 + 3 + 2 + 1, 4 + 3)
    assert iterative("angular", depth=1).runs(3) == (3, 0)
