"""The loop that keeps a batch full against stock generation, one prompt at a time."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdd.forward import decoding
from sdd.forward.decoding import decode, keeps_all
from sdd.models.checkpoints import Checkpoint

NEW = 16
STOPS = [2, *range(7, 256, 9)]
"""So many that some rows of random words end early, and others at the limit."""


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return Checkpoint(tiny_llama).model("float32", attention="eager")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Eleven of 1 to 40 tokens, two alike; the longer half goes on with its own beginning, which may be repeated."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(10, 256, (n,), generator=generator).tolist() for n in (9, 1, 20, 4, 31, 2, 13, 17, 5, 3)]
    return [row + row[:-2] if len(row) > 8 else row for row in rows] + [rows[2]]


@torch.no_grad()
def stock(model: Any, prompt: list[int], new: int = NEW, stops: Sequence[int] = STOPS) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=list(stops)
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def passes_of(model: Any, run: Callable[[], Any]) -> tuple[Any, int]:
    """What a function gives, and how often it ran the model, passes over prompts left out."""
    count = [0]
    handle = model.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    try:
        return run(), count[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_full_batch_says_what_stock_generation_says_to_each_prompt(
    attention: str, batch_size: int, tiny_llama: Path, prompts: list[list[int]]
) -> None:
    """Mixed lengths, more rows than places, stops and the limit."""
    model = Checkpoint(tiny_llama).model("float32", attention=attention)
    answers = list(decode(model, prompts, NEW, STOPS, batch_size))
    assert sorted(index for index, _ in answers) == list(range(len(prompts)))
    expected = [stock(model, prompt) for prompt in prompts]
    assert [tokens for _, tokens in sorted(answers)] == expected
    assert len({len(tokens) for tokens in expected}) > 3
    assert any(tokens[-1] not in STOPS for tokens in expected)


def test_what_all_prompts_begin_with_is_read_once(model: Any, prompts: list[list[int]]) -> None:
    shared = list(range(100, 120))
    rows = [shared + prompt for prompt in prompts] + [shared]
    read: list[int] = []
    body = model.get_decoder()
    handle = body.register_forward_pre_hook(lambda *a: read.append(a[-1]["input_ids"].numel()), with_kwargs=True)
    try:
        answers = dict(decode(model, rows, NEW, STOPS, 4))
    finally:
        handle.remove()
    assert read[0] == len(shared) - 1, "the last token of the prompt that is nothing else is left for the first step"
    assert answers == {index: stock(model, row) for index, row in enumerate(rows)}
    assert dict(decode(model, [rows[0]] * 3, NEW, STOPS, 2)) == dict.fromkeys(range(3), answers[0])


def test_limits(model: Any, prompts: list[list[int]]) -> None:
    for new in (1, 2, 3):
        answers = dict(decode(model, prompts, new, [], 4))
        assert answers == {index: stock(model, row, new, [0]) for index, row in enumerate(prompts)}
        assert {len(tokens) for tokens in answers.values()} == {new}
    assert list(decode(model, [], NEW, STOPS, 4)) == []


def test_a_row_ends_where_it_is_told_to(model: Any, prompts: list[list[int]]) -> None:
    """Among several tokens of one pass too: what was drafted behind the end is dropped."""

    def ending(tokens: list[int], fresh: int) -> int | None:
        assert 1 <= fresh <= len(tokens)
        return 5 if len(tokens) >= 5 else None

    answers = dict(decode(model, prompts, NEW, [], 4, ending=ending))
    assert answers == {index: stock(model, row, 5, [0]) for index, row in enumerate(prompts)}


def test_what_repeats_is_drafted_and_the_answer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded teacher repeats its reference: fewer steps than tokens, the same tokens."""
    from sdd.data.tiny import TinyTasks
    from sdd.models.chats import REWRITE_TEMPLATE, chat_prompt_ids, rewrite_prompt

    checkpoint = Checkpoint(Path(decoding.__file__).parents[1] / "tiny" / "teacher")
    model, tokenizer = checkpoint.model("float32", attention="eager"), checkpoint.tokenizer()
    texts = [rewrite_prompt(REWRITE_TEMPLATE, e.prompt, e.reference) for e in TinyTasks(num_rows=8).examples()]
    rows = [chat_prompt_ids(tokenizer, text) for text in texts]
    drafted, steps = passes_of(model, lambda: dict(decode(model, rows, 48, [tokenizer.eos_token_id], 2)))
    monkeypatch.setattr(decoding, "DRAFT", 0)
    plain, plain_steps = passes_of(model, lambda: dict(decode(model, rows, 48, [tokenizer.eos_token_id], 2)))
    assert drafted == plain
    assert steps < 0.9 * plain_steps


@pytest.mark.parametrize("batch_size", [1, 12])
def test_what_other_rows_said_is_drafted(model: Any, prompts: list[list[int]], batch_size: int) -> None:
    """One token for every row of a larger batch, as the model is small, once enough of them are guessed."""
    rows = prompts[:1] * batch_size
    once, steps = passes_of(model, lambda: dict(decode(model, rows, NEW, [], batch_size)))
    twice, more = passes_of(model, lambda: dict(decode(model, 2 * rows, NEW, [], batch_size)))
    assert twice == dict.fromkeys(range(2 * batch_size), once[0])
    assert more <= 1.75 * steps


def test_chosen_tokens_are_told_by_prompt_and_number(model: Any, prompts: list[list[int]]) -> None:
    """A choice that is a function of (prompt, number) and the logits is made once for every token that stands."""

    def choose(logits: Any, places: Sequence[tuple[int, int]]) -> Any:
        assert len(logits) == len(places)
        ranks = torch.tensor([(7 * row + number) % 3 for row, number in places])
        return logits.topk(3).indices.gather(1, ranks[:, None])[:, 0]

    answers = dict(decode(model, prompts, NEW, STOPS, 4, choose))
    assert dict(decode(model, prompts, NEW, STOPS, 1, choose)) == answers
    assert answers != dict(decode(model, prompts, NEW, STOPS, 4))


def test_rotary_frequencies_that_follow_the_longest_row_are_left_to_stock_code(model: Any) -> None:
    assert keeps_all(model)
    rotary = model.get_decoder().rotary_emb
    rotary.rope_type = "dynamic"
    try:
        assert not keeps_all(model)
    finally:
        rotary.rope_type = "default"
