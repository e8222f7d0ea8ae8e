"""Criteria on cases done by hand, and their tables against a direct computation, one text at a time."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sdd.config.parts import TARGETS, maker_of
from sdd.forward.batches import show_texts, tokenize_texts
from sdd.importance.criteria import Blind, BlockCriterion, ChannelCriterion, OfRows
from sdd.importance.removal import iterative
from sdd.importance.states import (
    Angular,
    BlockInfluence,
    Last,
    Random,
    angular_distance,
    block_influence,
    chosen_blocks,
    last_real,
    window_sums,
)
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint
from sdd.stages.scores import SPECS

BLOCKS = 4

# ---- pure functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([3.0, 0.0], [3.0, 0.0], 0.0),
        ([1.0, 0.0], [7.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 2.0], 0.5),
        ([1.0, 0.0], [1.0, 1.0], 0.25),
        ([1.0, 0.0], [-0.5, math.sqrt(3) / 2], 2 / 3),
        ([1.0, 2.0], [-2.0, -4.0], 1.0),
    ],
)
def test_angular_distance_by_hand(x: list[float], y: list[float], expected: float) -> None:
    distance = angular_distance(torch.tensor([x]), torch.tensor([y]))
    assert distance.shape == (1,)
    assert distance.item() == pytest.approx(expected, abs=1e-7)


def test_angular_distance_is_taken_over_the_feature_axis_of_each_row() -> None:
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    y = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    assert angular_distance(x, y).tolist() == pytest.approx([0.0, 1.0])


def test_angular_distance_equals_the_arccos_form() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(500, 16, generator=generator) for _ in range(2))
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
    assert (angular_distance(x, y) - cosine.arccos() / math.pi).abs().max() < 1e-7


def test_angular_distance_has_no_noise_floor_near_zero() -> None:
    """arccos of a cosine in float32 reads up to 3e-4 for equal rows, and cannot see an angle of 1e-6."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator)
    in_float32 = torch.nn.functional.cosine_similarity(x, x.clone()).clamp(-1, 1).arccos() / math.pi
    assert in_float32.max() > 1e-5
    assert angular_distance(x, x.clone()).max() < 1e-12
    turned = torch.tensor([[1.0, math.tan(math.pi * 1e-6)]], dtype=torch.float64)
    assert angular_distance(torch.tensor([[1.0, 0.0]]), turned).item() == pytest.approx(1e-6, rel=1e-9, abs=0)


def test_angular_distance_survives_bfloat16_and_zero_rows() -> None:
    x = torch.tensor([[0.0, 0.0], [1e-20, 0.0]], dtype=torch.bfloat16)
    y = torch.tensor([[1.0, 0.0], [0.0, 1e20]], dtype=torch.bfloat16)
    assert angular_distance(x, y).tolist() == pytest.approx([0.5, 0.5])
    assert angular_distance(torch.tensor([[1e-30, 0.0]]), torch.tensor([[1.0, 0.0]])).tolist() == [0.0]


def test_block_influence_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 1.0]]])
    y = torch.tensor([[[2.0, 0.0], [0.0, 5.0]], [[-3.0, 0.0], [1.0, 0.0]]])
    influence = block_influence(x, y)
    assert influence.shape == (2, 2)
    assert influence.flatten().tolist() == pytest.approx([0.0, 1.0, 2.0, 1 - math.sqrt(0.5)])


def test_window_sums_by_hand() -> None:
    assert window_sums([1.0, 2.0, 4.0]) == {"1": [1.0, 2.0, 4.0], "2": [3.0, 6.0]}


def test_last_real_with_padding_on_either_side() -> None:
    hidden = torch.arange(3 * 4 * 2, dtype=torch.float32).view(3, 4, 2)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(last_real(hidden, mask), torch.stack([hidden[0, 1], hidden[1, 3], hidden[2, 3]]))


# ---- tables against a direct computation ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_llama: Any) -> Any:
    return Checkpoint(tiny_llama).model("float32")


@pytest.fixture(scope="module")
def rows(tokenizer: Any, conversations: list[str]) -> list[list[int]]:
    rows = tokenize_texts(tokenizer, conversations, 64)
    assert len({len(row) for row in rows}) > 3, "texts of different lengths are what padding is about"
    return rows


@torch.no_grad()
def direct_states(model: Any, ids: list[int]) -> list[Tensor]:
    """h_0 ... h_L of one text, (T, D) each. transformers gives the last one after the final norm: taken by a hook."""
    caught: list[Tensor] = []
    handle = checkpoints.blocks(model)[-1].register_forward_hook(
        lambda module, arguments, output: caught.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        given = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    finally:
        handle.remove()
    assert len(given) == BLOCKS + 1
    assert not torch.allclose(given[-1], caught[0], atol=0.1), "the last entry is expected to be normed"
    return [state[0] for state in (*given[:-1], caught[0])]


def arccos_distance(x: Tensor, y: Tensor) -> float:
    x, y = x.double(), y.double()
    return float(torch.dot(x, y).div(x.norm() * y.norm()).clamp(-1, 1).arccos()) / math.pi


def measured(model: Any, criterion: Any, rows: list[list[int]], batch_size: int = 3) -> dict[str, Any]:
    criterion.start(BLOCKS)
    show_texts(model, criterion, rows, batch_size)
    scores: dict[str, Any] = criterion.scores()
    return scores


def flat(table: dict[str, list[float]]) -> list[float]:
    return [value for n in sorted(table, key=int) for value in table[n]]


def test_angular_table_is_the_mean_angle_of_every_span(model: Any, rows: list[list[int]]) -> None:
    states = [direct_states(model, row) for row in rows]
    table = measured(model, Angular(), rows)["distance"]
    assert [len(table[str(n)]) for n in range(1, BLOCKS)] == [4, 3, 2]
    apart = []
    for n in range(1, BLOCKS):
        for start in range(BLOCKS - n + 1):
            angles = [arccos_distance(text[start][-1], text[start + n][-1]) for text in states]
            assert table[str(n)][start] == pytest.approx(sum(angles) / len(rows), abs=1e-6), (n, start)
            cosines = [math.cos(math.pi * angle) for angle in angles]
            of_mean_cosine = math.acos(sum(cosines) / len(rows)) / math.pi
            apart.append(abs(of_mean_cosine - table[str(n)][start]))
    assert max(apart) > 1e-4, "the case cannot tell the two means apart"


def test_block_influence_weighs_every_real_token_alike(model: Any, rows: list[list[int]]) -> None:
    states = [direct_states(model, row) for row in rows]
    scores = measured(model, BlockInfluence(), rows)
    for block in range(BLOCKS):
        tokens = torch.cat([block_influence(text[block], text[block + 1]) for text in states])
        assert len(tokens) == sum(map(len, rows))
        assert scores["distance"]["1"][block] == pytest.approx(float(tokens.mean()), abs=1e-6)
    values = scores["distance"]["1"]
    assert scores["order"] == sorted(range(BLOCKS), key=values.__getitem__)
    assert scores["distance"]["3"] == pytest.approx([sum(values[0:3]), sum(values[1:4])])


@pytest.mark.parametrize("criterion", [Angular, BlockInfluence])
def test_scores_do_not_depend_on_the_batch_size(criterion: Any, model: Any, rows: list[list[int]]) -> None:
    """Seven texts in batches of 1, 2, 3 and 7: the incomplete last batch counts, padding does not."""
    alone = flat(measured(model, criterion(), rows, batch_size=1)["distance"])
    for batch_size in (2, 3, 7):
        assert flat(measured(model, criterion(), rows, batch_size)["distance"]) == pytest.approx(alone, abs=1e-6)
    fewer = flat(measured(model, criterion(), rows[:6], batch_size=3)["distance"])
    assert fewer != pytest.approx(alone, abs=1e-4), "the case cannot tell a dropped text"


@pytest.mark.parametrize("criterion", [Angular, BlockInfluence])
@torch.no_grad()
def test_scores_do_not_depend_on_the_padding_side(criterion: Any, model: Any, rows: list[list[int]]) -> None:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    left = criterion()
    left.start(BLOCKS)
    states: list[Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda module, arguments, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in checkpoints.blocks(model)
    ]
    model(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    states.insert(0, model.get_input_embeddings()(ids))
    for block in range(BLOCKS):
        left.observe(block, states[block], states[block + 1], mask)
    left.finish_batch()
    right = flat(measured(model, criterion(), rows, batch_size=7)["distance"])
    assert flat(left.scores()["distance"]) == pytest.approx(right, abs=1e-5)


@pytest.mark.parametrize("block", range(BLOCKS))
@pytest.mark.parametrize("criterion", [Angular, BlockInfluence])
def test_a_block_that_does_nothing_is_the_one_proposed(
    criterion: Any, block: int, tiny_llama: Any, rows: list[list[int]]
) -> None:
    """Block 0 needs the embedding state, the last one the state before the final norm, the others no shift by one."""
    model = Checkpoint(tiny_llama).model("float32")
    _silence(model, block)
    scores = measured(model, criterion(), rows)
    assert scores["distance"]["1"][block] < 1e-6
    assert min(value for index, value in enumerate(scores["distance"]["1"]) if index != block) > 1e-3
    assert chosen_blocks(scores, 1)[0] == [block]


def _silence(model: Any, *blocks: int) -> None:
    with torch.no_grad():
        for block in blocks:
            checkpoints.blocks(model)[block].self_attn.o_proj.weight.zero_()
            checkpoints.blocks(model)[block].mlp.down_proj.weight.zero_()


def test_blocks_apart_are_chosen_by_order_and_not_by_span(tiny_llama: Any, rows: list[list[int]]) -> None:
    model = Checkpoint(tiny_llama).model("float32")
    _silence(model, 0, 3)
    assert chosen_blocks(measured(model, BlockInfluence(), rows), 2)[0] == [0, 3]
    contiguous = measured(model, BlockInfluence(contiguous=True), rows)
    assert "order" not in contiguous
    removed, score = chosen_blocks(contiguous, 2)
    assert removed in ([0, 1], [2, 3])
    assert score == min(contiguous["distance"]["2"])
    _silence(model, 1)
    assert chosen_blocks(measured(model, Angular(), rows), 2) == ([0, 1], pytest.approx(0, abs=1e-6))


# ---- controls and choice ----------------------------------------------------------------------------------------


def test_random_is_a_permutation_decided_by_its_seed() -> None:
    def order(seed: int) -> list[int]:
        criterion = Random(seed)
        criterion.start(12)
        found: list[int] = criterion.scores()["order"]
        return found

    assert order(0) == order(0)
    assert sorted(order(0)) == list(range(12))
    assert len({tuple(order(seed)) for seed in range(10)}) > 5


def test_last_takes_blocks_from_the_end() -> None:
    criterion = Last()
    criterion.start(5)
    scores = criterion.scores()
    assert scores["order"] == [4, 3, 2, 1, 0]
    assert chosen_blocks(scores, 2)[0] == [3, 4]
    spans = scores["distance"]["2"]
    assert spans.index(min(spans)) == 3


def test_the_final_block_is_kept_to_the_end() -> None:
    criterion = Last(keep_final=True)
    criterion.start(5)
    scores = criterion.scores()
    assert (criterion.name, scores["order"]) == ("last_keep_final", [3, 2, 1, 0, 4])
    assert chosen_blocks(scores, 2) == ([2, 3], 1.0)
    assert min(scores["distance"]["2"]) == scores["distance"]["2"][2]


@pytest.mark.parametrize("criterion", [Random(), Last(), Last(keep_final=True)])
def test_controls_look_at_nothing(criterion: Any) -> None:
    assert isinstance(criterion, Blind)
    assert not hasattr(criterion, "observe")


def test_what_a_criterion_looks_at_is_its_type() -> None:
    """Each is of one kind, and so has one kind of key; what goes by the task is shown rows, its likes texts."""
    criteria = [maker_of(id)() for id in sorted(TARGETS["metric",])]
    criteria += [iterative(by) for by in ("angular", "perplexity", "task")]
    assert len(criteria) == 16
    for criterion in criteria:
        assert isinstance(criterion, BlockCriterion) != isinstance(criterion, ChannelCriterion)
        assert len([kind for kind in SPECS if isinstance(criterion, kind)]) == 1, criterion.name
    assert [isinstance(criterion, OfRows) for criterion in criteria[-3:]] == [False, False, True]


def test_chosen_blocks_of_a_table_and_of_an_order() -> None:
    table = {"distance": {"1": [0.3, 0.1, 0.2, 0.1], "2": [0.5, 0.2, 0.4]}}
    assert chosen_blocks(table, 2) == ([1, 2], 0.2)
    assert chosen_blocks(table, 1) == ([1], 0.1), "the first of equals"
    assert chosen_blocks(table | {"order": [3, 1, 2, 0]}, 3) == ([1, 2, 3], pytest.approx(0.4))
    steps = [
        {"removed": 3, "scores": [0.3, 0.1, 0.2, 0.1]},
        {"removed": 1, "scores": [0.9, 0.8, 0.7, None]},
        {"removed": 0, "scores": [5.0, None, 6.0, None]},
    ]
    assert chosen_blocks(table | {"order": [3, 1, 0], "steps": steps}, 2) == ([1, 3], pytest.approx(0.1 + 0.8))
