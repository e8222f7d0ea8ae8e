"""Acceptance from one teacher-forced pass against what drafting and verifying really does."""

import math
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from sdd.analysis.speculative import (
    Passes,
    expected_block_efficiency,
    generate,
    greedy_matches,
    overlap,
    predicted_speedup,
    sampling_acceptance,
    simulate,
)
from sdd.models import checkpoints
from sdd.models.chats import chat_prompt_ids, stop_ids
from sdd.models.checkpoints import Checkpoint
from sdd.pruning.depth import prune_checkpoint
from sdd.rewriting.engines import HFEngine, Request

NEW_TOKENS = 24
PROMPTS = ["What is 3 plus 4?", "Sort: pear, fig, apple.", "Say the word lamp twice."]


@pytest.fixture(scope="module")
def pair(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """(teacher, student, tokenizer): a random model with its last block half as strong, and the same without it.

    The last block is weakened so that the student agrees with the teacher often, and not always.
    """
    folder = tmp_path_factory.mktemp("student")
    prune_checkpoint(Checkpoint(tiny_llama), folder, [3])
    teacher, student = (Checkpoint(path).model("float32") for path in (tiny_llama, folder))
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            checkpoints.blocks(teacher)[3].get_submodule(name).weight *= 0.25
    return teacher, student, Checkpoint(tiny_llama).tokenizer()


@pytest.fixture(scope="module")
def answered(pair: tuple[Any, Any, Any]) -> list[tuple[list[int], list[int], bool]]:
    """(prompt, the teacher's greedy answer, whether it ended by itself) of each prompt."""
    teacher, _, tokenizer = pair
    engine = HFEngine(max_new_tokens=NEW_TOKENS)
    engine.take(teacher, tokenizer, None, batch_size=2)
    said = {one.id: one for one in engine.complete([Request(prompt, prompt) for prompt in PROMPTS])}
    return [(chat_prompt_ids(tokenizer, p), list(said[p].tokens), said[p].finish == "stop") for p in PROMPTS]


def drafted_by_hand(student: Any, prompt: list[int], answer: list[int], k: int, stopped: bool) -> Passes:
    """Draft a token at a time from the prefix that is there, keep what the answer repeats, add the answer's own."""
    at, passes, drafted, accepted = 0, 0, 0, 0
    while at < len(answer):
        draft: list[int] = []
        for _ in range(min(k, len(answer) - at if stopped else len(answer) - at - 1)):
            with torch.no_grad():
                logits = student(input_ids=torch.tensor([prompt + answer[:at] + draft])).logits
            draft.append(int(logits[0, -1].argmax()))
        kept = 0
        while kept < len(draft) and draft[kept] == answer[at + kept]:
            kept += 1
        passes, drafted, accepted = passes + 1, drafted + len(draft), accepted + kept
        at = min(len(answer), at + kept + 1)
    return Passes(len(answer), passes, drafted, accepted)


def test_simulation_by_hand() -> None:
    matches = [True, True, False, True, False, True]
    # k=2: [1 1 +0] [1 0!] [1], the last draft ends the answer: 3 passes, 2 + 2 + 1 drafted, 2 + 1 + 1 accepted
    assert simulate(matches, 2, stopped=True) == Passes(6, 3, 5, 4)
    # cut at the limit: the last token is the teacher's, so nothing is drafted for it
    assert simulate(matches, 2, stopped=False) == Passes(6, 3, 4, 3)
    assert simulate(matches, 1, stopped=True) == Passes(6, 4, 4, 3)
    assert simulate([False] * 4, 3, stopped=True) == Passes(4, 4, 9, 0)
    assert simulate([True] * 8, 3, stopped=True) == Passes(8, 2, 6, 6)
    one = simulate(matches, 2, stopped=True)
    assert one.block_efficiency == 2
    assert one.mean_accepted_length == pytest.approx(4 / 3)
    assert one.accepted_share == 0.8
    assert one + Passes(4, 1, 3, 2) == Passes(10, 4, 8, 6)


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_one_pass_tells_what_drafting_does(pair: tuple, answered: list, k: int) -> None:
    student = pair[1]
    matches = greedy_matches(student, [(prompt, answer) for prompt, answer, _ in answered], batch_size=2)
    for (prompt, answer, stopped), row in zip(answered, matches, strict=True):
        assert simulate(row, k, stopped) == drafted_by_hand(student, prompt, answer, k, stopped)
    if k == 5:
        agreed = [match for row in matches for match in row]
        assert 0.2 < sum(agreed) / len(agreed) < 0.98, "the case tells nothing"


@pytest.mark.parametrize("k", [1, 4])
def test_transformers_takes_as_many_passes_and_says_the_same(pair: tuple, answered: list, k: int) -> None:
    teacher, student, tokenizer = pair
    stops = stop_ids(tokenizer, teacher.generation_config)
    matches = greedy_matches(student, [(prompt, answer) for prompt, answer, _ in answered], batch_size=3)
    for (prompt, answer, stopped), row in zip(answered, matches, strict=True):
        plain = generate(teacher, prompt, stops, NEW_TOKENS)
        assisted = generate(teacher, prompt, stops, NEW_TOKENS, (student, k))
        assert plain.tokens == assisted.tokens == answer
        assert plain.passes == len(answer)
        assert assisted.passes == simulate(row, k, stopped).passes


def test_ended_answer_is_drafted_to_its_end(pair: tuple, answered: list) -> None:
    """With the teacher's fifth token taken for the end of the turn, the end itself may be drafted."""
    teacher, student, _ = pair
    prompt, answer, _ = answered[0]
    end = answer.index(answer[4]) + 1
    for k, draft in product((1, 3, 6), (student, deepcopy(teacher))):
        (row,) = greedy_matches(draft, [(prompt, answer[:end])], batch_size=1)
        assisted = generate(teacher, prompt, [answer[4]], NEW_TOKENS, (draft, k))
        assert assisted.tokens == answer[:end]
        assert assisted.passes == simulate(row, k, stopped=True).passes


def test_teacher_that_drafts_for_itself_is_always_accepted(pair: tuple, answered: list) -> None:
    rows = [(prompt, answer) for prompt, answer, _ in answered]
    assert all(all(row) for row in greedy_matches(pair[0], rows, batch_size=2))
    sampled = sampling_acceptance(pair[0], pair[0], rows, 2, temperature=0.7)
    assert [len(row) for row in sampled] == [len(answer) for _, answer in rows]
    assert all(value == pytest.approx(1, abs=1e-5) for row in sampled for value in row)


def test_sampling_is_seeded_and_takes_fewer_passes_than_tokens(pair: tuple, answered: list) -> None:
    teacher, _, tokenizer = pair
    stops, prompt = stop_ids(tokenizer, teacher.generation_config), answered[1][0]
    plain, again = (generate(teacher, prompt, stops, 16, sampled=(1.0, 3)) for _ in range(2))
    assert plain.tokens == again.tokens
    assert plain.tokens != generate(teacher, prompt, stops, 16, sampled=(1.0, 4)).tokens
    own = generate(teacher, prompt, stops, 16, (deepcopy(teacher), 3), (1.0, 3))
    assert own.passes == math.ceil(len(own.tokens) / 4)


def test_overlap_by_hand() -> None:
    p = torch.log(torch.tensor([[0.5, 0.25, 0.25], [1.0, 1e-9, 1e-9]]))
    q = torch.log(torch.tensor([[0.25, 0.25, 0.5], [1e-9, 1.0, 1e-9]]))
    assert overlap(p, q, 1.0).tolist() == pytest.approx([0.75, 0.0], abs=1e-6)
    assert overlap(p, p, 2.0).tolist() == pytest.approx([1.0, 1.0])
    # at half the temperature p is (4, 1, 1) / 6 and q (1, 1, 4) / 6
    assert float(overlap(p, q, 0.5)[0]) == pytest.approx(0.5)


def test_predictions_by_hand() -> None:
    assert expected_block_efficiency(0.5, 2) == 1.75
    assert expected_block_efficiency(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert expected_block_efficiency(1.0, 3) == 4
    assert predicted_speedup(1.75, 2, 0.25) == pytest.approx(1.75 / 1.5)
    assert predicted_speedup(3.0, 4, 0.1, verification=1.6) == pytest.approx(1.5)
