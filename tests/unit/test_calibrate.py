"""The pass over texts: what is tokenized, how it is batched, and what is not computed."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from sdd.errors import UserError
from sdd.forward.batches import length_batches, show_texts, tokenize_texts
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint


class Recorder:
    """A criterion that only takes notes."""

    name = "recorder"

    def __init__(self) -> None:
        self.seen: list[tuple[int, tuple[int, ...], int]] = []
        self.batches = 0

    def start(self, num_blocks: int) -> None: ...

    def observe(self, block: int, entering: Tensor, leaving: Tensor, mask: Tensor) -> None:
        assert entering.shape == leaving.shape
        assert entering.shape[:2] == mask.shape
        assert not entering.requires_grad
        self.seen.append((block, tuple(mask.sum(1).tolist()), int(mask.shape[1])))

    def finish_batch(self) -> None:
        self.batches += 1

    def scores(self) -> dict[str, Any]:
        return {}


def test_texts_get_the_default_special_tokens_and_no_others(tokenizer: Any) -> None:
    (row,) = tokenize_texts(tokenizer, ["Sort these letters: d b a c"], 64)
    assert row[0] == tokenizer.bos_token_id
    assert row.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in row
    assert tokenizer.decode(row[1:]) == "Sort these letters: d b a c"


def test_long_texts_are_cut_from_the_end(tokenizer: Any, conversations: list[str]) -> None:
    whole = tokenize_texts(tokenizer, conversations, 10_000)
    cut = tokenize_texts(tokenizer, conversations, 20)
    assert [len(row) for row in cut] == [min(20, len(row)) for row in whole]
    assert all(short == long[:20] for short, long in zip(cut, whole, strict=True))
    assert max(map(len, whole)) > 20


def test_a_text_of_one_token_is_named(tokenizer: Any) -> None:
    with pytest.raises(UserError) as caught:
        tokenize_texts(tokenizer, ["enough text", "", "more"], 64)
    assert "text 2 has 1 token" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("batch_size", "max_tokens"), [(1, 1000), (4, 60), (64, 100), (3, 10)])
def test_length_batches_hold_every_row_once_within_bounds(batch_size: int, max_tokens: int) -> None:
    rng = random.Random(batch_size)
    lengths = [rng.randint(2, 40) for _ in range(101)]
    batches = length_batches(lengths, batch_size, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(101))
    for batch in batches:
        assert len(batch) <= batch_size
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths, reverse=True)
    assert length_batches([], batch_size, max_tokens) == []


def test_every_block_sees_every_batch_and_the_head_none(tiny_llama: Any) -> None:
    model = Checkpoint(tiny_llama).model("float32")

    def refuse(*_: Any) -> None:
        raise AssertionError("logits were computed")

    model.lm_head.register_forward_pre_hook(refuse)
    recorder = Recorder()
    rows = [[1, 5, 6], [1, 7], [1, 8, 9, 10], [1, 11, 12], [1, 13]]
    show_texts(model, recorder, rows, batch_size=2)
    assert recorder.batches == 3
    assert [block for block, _, _ in recorder.seen] == [0, 1, 2, 3] * 3
    assert [seen[1:] for seen in recorder.seen[::4]] == [((4, 3), 4), ((3, 2), 3), ((2,), 2)]


def test_padded_tokens_of_a_batch_are_bounded(tiny_llama: Any) -> None:
    recorder = Recorder()
    rows = [[1] * length for length in (9, 8, 7, 3, 3, 3)]
    show_texts(Checkpoint(tiny_llama).model("float32"), recorder, rows, batch_size=8, max_tokens=18)
    assert [len(lengths) for _, lengths, _ in recorder.seen[::4]] == [2, 2, 2]


def test_hooks_are_taken_off_even_after_a_failure(tiny_llama: Any) -> None:
    model = Checkpoint(tiny_llama).model("float32")

    class Failing(Recorder):
        def finish_batch(self) -> None:
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        show_texts(model, Failing(), [[1, 2, 3]], batch_size=1)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in checkpoints.blocks(model))
    assert torch.is_grad_enabled()
