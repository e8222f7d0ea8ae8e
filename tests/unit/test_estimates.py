"""Estimates against arithmetic by hand, and against what is known of real models."""

from dataclasses import replace

import pytest

from sdd.errors import UserError
from sdd.evaluation.suites import SUITES
from sdd.planning import estimates
from sdd.planning.cost_model import DEVICES, CostModel, Device, Shape, shape_of
from sdd.planning.estimates import TASKS, Task, Training

SMALL = Shape(hidden=8, intermediate=20, blocks=3, heads=2, groups=1, head_dim=4, vocabulary=50, tied=True)
MACHINE = Device("a machine", {4: 1e6, 2: 2e6}, bandwidth=1e5, disk=1e4, block_seconds=0.01, start_seconds=2.0)
WORK = CostModel(SMALL, 2, 4, MACHINE)
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
    assert memory == pytest.approx(3 * 8 * 64 + WORK.activations(15, 5) + WORK.logits(3))


def test_rewriting_keeps_its_batch_full() -> None:
    """A batch of 4: a chunk of 8 rows takes 3 steps and then the longest row's 6, twice, and 4 rows take 6; where one
    place in eight is less than one row, every row is read alone."""
    one = estimates.rewrites(WORK, rows=20, prompt=5, new=3, longest=6, batch=4, chunk=8)
    step = (7136 + 4 * 11 * 64) / 1e5
    assert one.seconds == pytest.approx(WORK.opening + WORK.passes(100, 5, 20, head=False) + (9 + 9 + 6) * step)
    assert one.memory == pytest.approx(7136 + 4 * 11 * 64 + WORK.activations(20, 5) + WORK.logits(4))
    alone = estimates.rewrites(WORK, rows=3, prompt=5, new=3, longest=6, batch=64, chunk=256)
    assert alone.seconds == pytest.approx(WORK.opening + WORK.generation(3, 5, 6, 3)[0] + WORK.passes(0, 5, 3 / 8 - 1))


def test_repair_is_scoring_a_regression_and_a_copy() -> None:
    """12 tokens of 20 activations and 8 states: 2 * 12 * 20 * 28 and 20^3 / 3 operations, twice as slow in float64."""
    one, copied = estimates.repaired(WORK, WORK, texts=2, length=6, batch=2), estimates.pruned(WORK)
    scored = estimates.scores(WORK, texts=2, length=6, batch=2)
    assert one.seconds == pytest.approx(scored.seconds + copied.seconds + 2 * (13440 + 8000 / 3) / 1e6)
    assert one.memory == pytest.approx(scored.memory + 8 * (3 * 400 + 2 * 160))
    assert one.disk == copied.disk


def test_training_by_hand() -> None:
    """20 rows of 4 tokens, 16 tokens a pass: 5 passes; 16 bytes of Adam, gradient and value a trained weight."""
    one = estimates.tuned(WORK, Training(100), rows=20, length=4, batch=10, micro_batch_tokens=16)
    assert one.seconds == pytest.approx(WORK.opening + 2 * WORK.passes(80, 4, 5))
    kept = 2 * 4 * (12 * 8 + 4 * 20)  # norms are in float32 already: 2 * 8, not 4 * 8
    assert one.memory == pytest.approx(7136 + 1600 + 16 * kept + 2 * 16 * 50 * 2 * 4)
    assert one.disk == 400


def test_blocks_below_what_is_trained_are_passed_once() -> None:
    """One of two blocks is trained over 4 epochs of 5 rows: the other is passed in a quarter of the steps."""
    settings = {"rows": 20, "length": 4, "batch": 5, "micro_batch_tokens": 20}
    one = estimates.tuned(WORK, Training(100, reach=1), **settings, epochs=4)
    assert one.seconds == pytest.approx(WORK.opening + (0.5 + 0.5 / 4 + 0.5) * WORK.passes(80, 4, 4))
    for whole in (Training(100), Training(100, reach=2)):
        assert estimates.tuned(WORK, whole, **settings, epochs=4) == estimates.tuned(WORK, whole, **settings)


def test_a_teacher_beside_the_student_by_hand() -> None:
    """80 tokens forward in the same 5 passes, 2,472 numbers in 16 bits, and 16 states of 8 of them."""
    teacher = CostModel(SMALL, 3, 2, MACHINE)
    settings = (WORK, Training(100), 20, 4, 10, 16)
    alone, one = estimates.tuned(*settings), estimates.tuned(*settings, teacher)
    numbers = 400 + 3 * 688 + 8
    passed = 80 * (3 * (2 * 688 + 4 * 2 * 8) + 800) / 2e6 + 5 * 3 * 0.01
    assert one.seconds - alone.seconds == pytest.approx(2 * numbers / 1e4 + passed)
    assert one.memory - alone.memory == pytest.approx(2 * numbers + 16 * 8 * 2 + 2 * 16 * 50 * 2 * 2)
    assert one.disk == alone.disk


@pytest.mark.parametrize(("tokens", "shown"), [(335_544, 335_544), (335_545, 256)])
def test_logits_of_a_pass_are_held_up_to_33_million_and_of_a_chunk_beyond(tokens: int, shown: int) -> None:
    """100 * 335,544 <= 2^25 < 100 * 335,545; a teacher's are made in chunks whatever their number."""
    cost_model = CostModel(replace(SMALL, vocabulary=100), 2, 4, MACHINE)
    kept = 2 * 4 * (12 * 8 + 4 * 20)  # norms are in float32 already: 2 * 8, not 4 * 8
    settings = (Training(0), tokens, 1, tokens, tokens)
    base = cost_model.weights + tokens * kept
    assert estimates.tuned(cost_model, *settings).memory == pytest.approx(base + 2 * shown * 100 * 2 * 4)
    taught = base + cost_model.weights + tokens * 4 * 8 + 2 * 2 * 256 * 100 * 2 * 4
    assert estimates.tuned(cost_model, *settings, teacher=cost_model).memory == pytest.approx(taught)


# The Llama 3.1 8B of the paper's table with 26 of its 32 blocks, in bfloat16; a pass of 4,096 tokens.
CUT = CostModel(shape_of(LLAMA_8B), 26, 2, DEVICES["gpu"])
BLOCK = 4096 * 2 * (14 * 4096 + 4 * 14336)  # activations that backward keeps of a block, bytes
LOGITS = 2 * 256 * 128256 * 2 * 2  # of a chunk: 4,096 positions are over the limit
LORA_BLOCK = 16 * (8192 + 5120 + 5120 + 8192 + 3 * 18432)  # rank 16 on seven layers: 1,310,720 weights


def of_8b(training: Training) -> tuple[float, float, float]:
    """(seconds in passes forward, bytes of memory, bytes on disk) of training on 8,000 rows of 256 tokens."""
    one = estimates.tuned(CUT, training, 8000, 256, 32, 4096)
    return (one.seconds - CUT.opening) / CUT.passes(8000 * 256, 256, 500), one.memory, one.disk


@pytest.mark.parametrize(
    ("training", "passes", "memory", "disk"),
    [
        (Training(26 * LORA_BLOCK), 2, 13_443_178_496 + 18 * 34_078_720 + 26 * BLOCK, 136_314_880),
        (Training(4 * LORA_BLOCK, reach=4), 1 + 4 / 26, 13_443_178_496 + 18 * 5_242_880 + 4 * BLOCK, 20_971_520),
        (Training(2 * LORA_BLOCK, reach=26), 2, 13_443_178_496 + 18 * 2_621_440 + 26 * BLOCK, 10_485_760),
        (Training(525_553_664), 2, 13_443_178_496 + 18 * 525_553_664 + 26 * BLOCK, 2_102_214_656),
        (Training(6_721_589_248, whole=True), 3, 18 * 6_721_589_248 + 26 * BLOCK, 26_886_356_992),
        # 5,670,699,008 weights of linear layers at 0.5 + 1/64 + 1/4096 bytes, 1,050,890,240 others at 2
        (Training(26 * LORA_BLOCK, four_bit=True), 2, 5_027_119_054 + 18 * 34_078_720 + 26 * BLOCK, 136_314_880),
        (
            Training(26 * LORA_BLOCK, recomputed=True),
            3,
            13_443_178_496 + 18 * 34_078_720 + BLOCK + 26 * 4096 * 2 * 4096,
            136_314_880,
        ),
    ],
    ids=["lora", "last", "beside the cut", "head and norms", "full", "nf4", "recomputed"],
)
def test_adapters_of_an_8b_model_by_hand(training: Training, passes: float, memory: float, disk: float) -> None:
    found = of_8b(training)
    assert found == pytest.approx((passes, memory + LOGITS, disk), rel=1e-6)


def test_an_8b_model_in_32_bits_is_trained_whole_in_16_bytes_a_weight() -> None:
    cost_model = CostModel(shape_of(LLAMA_8B), 26, 4, DEVICES["gpu"])
    one = estimates.tuned(cost_model, Training(6_721_589_248, whole=True), 8000, 256, 32, 4096)
    block = 4096 * 4 * (12 * 4096 + 4 * 14336)
    assert one.memory == pytest.approx(16 * 6_721_589_248 + 26 * block + 2 * LOGITS, rel=1e-6)


def test_head_and_norms_by_hand() -> None:
    assert estimates.head_and_norms_parameters(shape_of(LLAMA_8B), 26) == 525_336_576 + 53 * 4096 == 525_553_664
    assert estimates.head_and_norms_parameters(SMALL, 3) == 400 + 7 * 8


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
    """10 items of 6 tokens and 3 further choices of 2: 120 tokens, the beginnings of 8 / 2 items in a pass and their
    choices in another, logits of 80 tokens at 800 operations."""
    task = Task(10, 4, 6, choice=2)
    alone = estimates.evaluated(WORK, [task], None, batch=8)
    limited = estimates.evaluated(WORK, [task], 5, batch=8)
    spent = WORK.passes(120, 6, 5, head=False) + 80 * 800 / 1e6
    assert alone.seconds == pytest.approx(WORK.opening + spent)
    assert alone.seconds - WORK.opening == pytest.approx(2 * (limited.seconds - WORK.opening))
    assert (alone.disk, limited.disk) == (2e4, 1e4)
    both = estimates.evaluated(WORK, [task, Task(3, 1, 5, 3)], None, batch=8)
    assert both.seconds == pytest.approx(WORK.opening + spent + WORK.generation(3, 5, 3, 3)[0])


def test_long_beginnings_are_passed_alone_and_shared_ones_once() -> None:
    """Two items that own 300 of 500 tokens, of which 200 are those of all; two passes an item, one for what is shared;
    the tokens of an item go on from the shared ones."""
    seconds, _ = estimates.likelihoods(WORK, Task(2, 2, 500, choice=20, shared=200), None, batch=8)
    begun, after = WORK.passes(200, 200, 1, head=False), WORK.passes(2 * 320, 700, 4, head=False)
    assert seconds == pytest.approx(begun + after + 80 * 800 / 1e6)


def test_requests_carry_their_shots() -> None:
    arc, hellaswag = estimates.tasks_of({"arc_challenge": (1, 25, False), "hellaswag": (1, 10, False)})
    assert (arc.tokens, hellaswag.tokens) == (45 * 26, 90 * 11)
    assert estimates.tasks_of({"arc_challenge": (1, 0, False)})[0].tokens == 45


def test_a_limit_is_one_of_each_of_mmlus_subjects() -> None:
    (mmlu,) = estimates.tasks_of({"mmlu": (57, 5, True)})
    assert (mmlu.items, mmlu.parts, mmlu.tokens, mmlu.shared) == (14042, 57, 115 * 6, 115 * 5)
    assert [mmlu.limited(limit) for limit in (None, 2, 100, 5000)] == [14042, 114, 5700, 14042]
    assert TASKS["gsm8k"].limited(100) == 100
    one = estimates.evaluated(WORK, [mmlu], 2, batch=8)
    assert one.disk == 2e3 * 114
    begun = WORK.passes(57 * 575, 575, 57, head=False)
    spent = begun + WORK.passes(114 * 115, 690 + 575, 114 / 8, head=False) + 114 * 800 / 1e6
    assert one.seconds == pytest.approx(WORK.opening + spent)


def test_a_group_not_known_here_counts_its_tasks() -> None:
    stem, other = estimates.tasks_of({"mmlu_stem": (19, 5, True), "something": (1, 2, False)})
    assert (stem.items, stem.limited(10), stem.shared) == (19 * 250, 190, 500)
    assert (other.items, other.limited(10), other.shared) == (1000, 10, 0)


def test_an_8b_model_needs_what_is_known_of_it() -> None:
    """16 GB of weights in bfloat16; LoRA without checkpointing fits 80 GB; the leaderboard takes about an hour."""
    gpu = CostModel(shape_of(LLAMA_8B), 32, 2, DEVICES["gpu"])
    assert gpu.weights == pytest.approx(16.06e9, rel=1e-3)
    assert 17e9 < estimates.scores(gpu, 256, 1024, 16).memory < 25e9
    assert 40e9 < estimates.tuned(gpu, Training(42_000_000), 8000, 300, 32, 4096).memory < 90e9
    shown = {each.task: (1, each.shots or 0, False) for each in SUITES["openllm_v1"]}
    assert 1200 < estimates.evaluated(gpu, estimates.tasks_of(shown), None, 8).seconds < 11_000
