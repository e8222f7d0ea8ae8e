"""Estimates against arithmetic by hand, and against what is known of real models."""

import pytest

from sdd import estimates
from sdd.errors import UserError
from sdd.estimates import DEVICES, Device, Shape, Task, Work, shape_of

SMALL = Shape(hidden=8, intermediate=20, blocks=3, heads=2, groups=1, head_dim=4, vocabulary=50, tied=True)
MACHINE = Device("a machine", {4: 1e6, 2: 2e6}, bandwidth=1e5, disk=1e4, block_seconds=0.01, start_seconds=2.0)
WORK = Work(SMALL, 2, 4, MACHINE)
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_8B |= {"num_key_value_heads": 8, "vocab_size": 128256}


def test_parameters_by_hand() -> None:
    """A block: q 64, k 32, v 32, o 64, three matrices of 160, two norms of 8; 400 embeddings and a norm beside."""
    assert SMALL.block_parameters(1) == 64 + 32 + 32 + 64 + 480 + 16 == 688
    assert SMALL.parameters() == 400 + 3 * 688 + 8
    assert SMALL.parameters(2) == 400 + 2 * 688 + 8 == 1784


def test_parameters_of_the_papers_models() -> None:
    shape = shape_of(LLAMA_8B)
    assert shape.parameters() == 8_030_261_248
    assert shape.parameters() - shape.parameters(26) == 6 * 218_112_000
    assert shape_of(LLAMA_8B | {"vocab_size": 32768}).parameters() == 7_248_023_552


def test_a_mixture_holds_all_experts_and_computes_with_some() -> None:
    mixtral = LLAMA_8B | {"vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
    shape = shape_of(mixtral)
    assert shape.parameters() == 46_702_792_704
    assert shape.forward_flops(1, 0) == 2 * shape.block_parameters(2)
    assert shape.block_parameters(8) - shape.block_parameters(2) == 6 * 3 * 4096 * 14336


def test_sizes_that_lack_something_are_a_users_mistake() -> None:
    with pytest.raises(UserError, match="vocab_size"):
        shape_of({key: value for key, value in LLAMA_8B.items() if key != "vocab_size"})


def test_a_pass_by_hand() -> None:
    """10 tokens of 6 of context on average 3: 2 blocks of 2 * 688 + 4 * 3 * 8, a head of 2 * 8 * 50; 5 batches."""
    flops = 10 * (2 * (1376 + 96) + 800)
    assert WORK.passes(10, 6, 5) == pytest.approx(flops / 1e6 + 5 * 2 * 0.01)
    assert WORK.passes(10, 6, 5, cost=3) == pytest.approx(3 * WORK.passes(10, 6, 5))
    assert WORK.opening == pytest.approx(2 + 4 * 1784 / 1e4)


def test_a_generated_token_costs_whatever_is_slowest() -> None:
    """Here reading the weights: 7,136 bytes, and 3 rows' cache of 8 tokens at 64 bytes, over 1e5 bytes a second."""
    seconds, memory = WORK.generation(rows=6, prompt=5, new=3, batch=3)
    assert SMALL.cache_bytes(2, 4) == 2 * 2 * 1 * 4 * 4 == 64
    step = (7136 + 3 * 8 * 64) / 1e5
    assert seconds == pytest.approx(WORK.passes(30, 5, 2, head=False) + 2 * 3 * step)
    assert memory == pytest.approx(3 * 8 * 64 + WORK.activations(15) + WORK.logits(3))


def test_training_by_hand() -> None:
    """20 rows of 4 tokens, 16 tokens a pass: 5 passes; 16 bytes of Adam, gradient and value a trained weight."""
    one = estimates.tuned(WORK, trained=100, rows=20, length=4, batch=10, micro_batch_tokens=16)
    assert one.seconds == pytest.approx(WORK.opening + 2.5 * WORK.passes(80, 4, 5))
    kept = 2 * 4 * (20 * 8 + 10 * 20)
    assert one.memory == pytest.approx(7136 + 1600 + 16 * kept + 2 * 16 * 50 * 2 * 4)
    assert one.disk == 400


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["q_proj", "v_proj"], 2 * 3 * (16 + 12)),
        (["all-linear"], 2 * 3 * (16 + 12 + 12 + 16 + 3 * 28)),
        (["q_proj", "other"], 2 * 3 * (16 + 12 + 12 + 16 + 3 * 28)),
    ],
)
def test_adapter_parameters_by_hand(names: list[str], count: int) -> None:
    assert estimates.adapter_parameters(SMALL, 2, 3, names) == count


def test_evaluation_adds_up_its_tasks() -> None:
    alone = estimates.evaluated(WORK, [Task(10, 4, 6)], None, batch=8)
    limited = estimates.evaluated(WORK, [Task(10, 4, 6)], 5, batch=8)
    assert alone.seconds == pytest.approx(WORK.opening + WORK.passes(240, 6, 5))
    assert alone.seconds - WORK.opening == pytest.approx(2 * (limited.seconds - WORK.opening))
    assert (alone.disk, limited.disk) == (2e4, 1e4)
    both = estimates.evaluated(WORK, [Task(10, 4, 6), Task(3, 1, 5, 3)], None, batch=3)
    spent, _ = WORK.generation(3, 5, 3, 3)
    assert both.seconds == pytest.approx(WORK.opening + WORK.passes(240, 6, 40 / 3) + spent)


def test_leaderboard_requests_carry_their_shots() -> None:
    arc, hellaswag = estimates.tasks_of("openllm_v1", None)[:2]
    assert (arc.tokens, hellaswag.tokens) == (45 * 26, 90 * 11)
    assert estimates.tasks_of("sdmprune_zero_shot", ["arc_challenge"])[0].tokens == 45
    assert estimates.tasks_of("tiny", ["fact"])[0].new > 0


def test_an_8b_model_needs_what_is_known_of_it() -> None:
    """16 GB of weights in bfloat16; LoRA without checkpointing fits 80 GB; the leaderboard takes about an hour."""
    gpu = Work(shape_of(LLAMA_8B), 32, 2, DEVICES["gpu"])
    assert gpu.weights == pytest.approx(16.06e9, rel=1e-3)
    assert 17e9 < estimates.scores(gpu, 256, 1024, 16).memory < 25e9
    assert 40e9 < estimates.tuned(gpu, 42_000_000, 8000, 300, 32, 4096).memory < 90e9
    assert 1200 < estimates.evaluated(gpu, estimates.tasks_of("openllm_v1", None), None, 8).seconds < 11_000
