"""Memory that does not last: every engine goes on with half of the rows, and comes to what it comes to with room.

No GPU is here to be full. A hook says that it is, where a pass has more rows than are meant to fit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from sdd.analysis import shift
from sdd.evaluation.likelihoods import _Walk
from sdd.evaluation.prefixes import prefix_tree
from sdd.finetuning.adapters import adapted, causal_lm
from sdd.finetuning.module import Optimisation, StudentModule, TrainingRow
from sdd.finetuning.prefix import frozen_states
from sdd.forward.batches import show_texts
from sdd.forward.decoding import decode
from sdd.forward.memory import is_short
from sdd.forward.parts import Parts
from sdd.importance.sample_gradients import Distillation, channel_importance
from sdd.importance.states import Angular
from sdd.models.checkpoints import Checkpoint, blocks
from sdd.rewriting.engines import HFEngine, Request

LENGTHS = (23, 9, 5, 17, 31, 12)
IDS = [[1, *(6 + (7 * at * length) % 200 for at in range(length - 1))] for length in LENGTHS]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}
FULL = torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return Checkpoint(tiny_llama).model("float32", attention="eager")


@contextmanager
def room_for(model: Any, most: int, block: int = 2, backward: bool = False) -> Iterator[list[int]]:
    """While open, a pass of more rows ends in the middle; the rows of those that did."""
    failed: list[int] = []

    def check(module: Any, *given: Any) -> None:
        if (rows := len(given[0][0])) > most:
            failed.append(rows)
            raise FULL

    layer = blocks(model)[block]
    handle = layer.register_full_backward_hook(check) if backward else layer.register_forward_pre_hook(check)
    try:
        yield failed
    finally:
        handle.remove()


def told(caplog: pytest.LogCaptureFixture) -> int:
    return caplog.text.count("out of memory: ")


def test_what_counts_as_short() -> None:
    assert is_short(FULL) and is_short(MemoryError()) and is_short(RuntimeError("... can't allocate memory: ..."))
    assert not is_short(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# ---- training ---------------------------------------------------------------------------------------------------


def fitted(student: Any, tokens: int, halves: bool = True) -> StudentModule:
    rows = [TrainingRow(ids, 3) for ids in IDS]
    plan, optimisation = [list(range(len(rows)))] * 2, Optimisation(1e-2, 0.0, 0.25, 1.0, 0, 2, 2)
    module = StudentModule(student, rows, plan, rows[:3], optimisation, tokens, halves=halves)
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    pl.Trainer(accelerator="cpu", max_steps=2, max_epochs=-1, enable_model_summary=False, **options).fit(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_a_step_is_begun_again_and_its_gradients_are_the_global_batchs(
    tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit by bit those of passes that were small from the first, though the failed pass had left gradients above."""

    def student() -> Any:
        torch.manual_seed(0)
        return adapted(Checkpoint(tiny_llama).model("float32", attention="eager"), LORA, None)

    short = student()
    with room_for(causal_lm(short), 2, backward=True) as failed:
        module = fitted(short, 10_000)
    assert failed == [6, 4] and told(caplog) == 2, "later steps begin with passes that fit"
    small = fitted(student(), module.fitting)
    assert module.fitting == 4 * 17 // 2
    assert module.history == small.history
    for (name, one), other in zip(module.trained().items(), small.trained().values(), strict=True):
        assert torch.equal(one, other), name
    saved: dict[str, Any] = {"state_dict": {}, "global_step": 2}
    module.on_save_checkpoint(saved)
    resumed = fitted(student(), 10_000)
    resumed.on_load_checkpoint(saved)
    assert resumed.fitting == module.fitting, "what goes on adds in the same order"
    for most, halves in ((0, True), (5, False)):
        short = student()
        with room_for(causal_lm(short), most, backward=True), pytest.raises(torch.OutOfMemoryError):
            fitted(short, 10_000, halves)


def test_kept_states_are_those_of_smaller_passes(tiny_llama: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = causal_lm(adapted(Checkpoint(tiny_llama).model("float32", attention="eager"), LORA, [2, 3]))
    shown = list(LENGTHS), IDS.__getitem__
    alone = frozen_states(model, *shown, tmp_path, 1)
    with room_for(model, 1, block=1) as failed:
        halved = frozen_states(model, *shown, tmp_path, 1000)
    assert alone is not None and halved is not None and failed == [6, 3, 2, 3, 2]
    one, other = (kept.states.of(range(len(LENGTHS))) for kept in (alone, halved))
    assert one is not None and other is not None and torch.equal(one, other)


# ---- generation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 4])
def test_answers_go_on_in_a_smaller_batch(most: int, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    expected = sorted(decode(model, IDS, 12, [2], 6))
    passes = [0]
    handle = model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))

    def check(module: Any, given: Any, named: Any) -> None:
        if len(named["input_ids"]) > most and passes[0] > 4:  # some tokens are there already
            raise FULL

    handles = [handle, model.get_decoder().register_forward_pre_hook(check, with_kwargs=True)]
    assert sorted(decode(model, IDS, 12, [2], 6)) == expected
    assert told(caplog) == {1: 3, 2: 2, 4: 1}[most]
    most, passes[0] = 0, 9
    with pytest.raises(torch.OutOfMemoryError):
        list(decode(model, IDS, 12, [2], 6))
    for one in handles:
        one.remove()


def test_stock_generation_is_halved_too(model: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    engine = HFEngine(max_new_tokens=6, temperature=0.7, seed=3)
    engine.take(model, tokenizer, None, 6)
    requests = [Request(str(number), "") for number in range(len(IDS))]
    expected = sorted(engine._generated(requests, IDS, [2]))
    with room_for(model, 2) as failed:
        assert sorted(engine._generated(requests, IDS, [2])) == expected
    assert failed == [6, 3, 3] and told(caplog) == 3, "three shorter rows might have fitted"


# ---- likelihoods and scores -------------------------------------------------------------------------------------


class Progress:
    count = 0

    def update(self, count: int) -> None:
        self.count += count


def walked(model: Any) -> tuple[Any, Any]:
    """Four choices after each of three contexts after the same examples."""
    rows = [(*range(10, 90), *(100 + c + n for n in range(40)), 20 + choice) for c in range(3) for choice in range(4)]
    progress = Progress()
    walk = _Walk(model, [30 + number for number in range(len(rows))], None, Parts())
    found = walk.run(prefix_tree(rows, [1] * len(rows)), 1 << 20, progress)
    assert progress.count == len(rows)
    return found


@pytest.mark.parametrize("below", [False, True])
def test_likelihoods_are_taken_in_halves(below: bool, model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Also where a row alone does not fit beside what several rows above it have left: then these are parted."""
    expected, greedy = walked(model)
    kept = [0]

    def check(module: Any, given: Any, named: Any) -> None:
        cache = named["past_key_values"]
        is_leaf = cache is None or (cache.layers and isinstance(vars(cache.layers[0]).get("update"), partial))
        if not is_leaf:
            kept[0] = len(named["input_ids"])
        if (below and is_leaf and kept[0] > 1) or (not below and len(named["input_ids"]) > 1):
            raise FULL

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    values, as_greedy = walked(model)
    handle.remove()
    assert told(caplog) > 1
    assert torch.allclose(values, expected, atol=1e-4) and torch.equal(greedy, as_greedy)


def test_passes_over_answers_are_halved_in_their_order(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [(ids[:3], ids[3:]) for ids in IDS]
    expected = shift.token_nll(model, rows, 6)
    with room_for(model, 2) as failed:
        found = shift.token_nll(model, rows, 6)
        shift.token_nll(model, rows, 2)
    assert failed == [6, 3, 3] and told(caplog) == 3, "three shorter rows might have fitted"
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_scores_are_added_in_halves(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A pass that ended in the middle, forward or back, leaves nothing in the sums."""

    def angles() -> Any:
        criterion = Angular()
        criterion.start(4)
        show_texts(model, criterion, IDS, 6)
        return torch.tensor(criterion.scores()["distance"]["1"])

    masked = [torch.arange(48) < 4 for _ in range(4)]

    def channels(max_tokens: int) -> Sequence[Any]:
        return channel_importance(model, IDS, max_tokens, Distillation(0.5, 1.0, masked))

    expected, alone = angles(), channels(1)
    with room_for(model, 2) as failed:
        assert torch.allclose(angles(), expected, atol=1e-6)
    assert failed == [6, 3]
    with room_for(model, 1, backward=True) as failed:
        halved = channels(1000)
    assert failed == [6, 3, 2] and told(caplog) == 5
    assert all(torch.equal(one, other) for one, other in zip(halved, alone, strict=True))


def test_one_that_keeps_no_sums_is_shown_no_text_twice(model: Any) -> None:
    class Noting:
        def observe(self, *given: Any) -> None: ...

        def finish_batch(self) -> None: ...

    with room_for(model, 2), pytest.raises(torch.OutOfMemoryError):
        show_texts(model, Noting(), IDS, 6)


# ---- what is let into free memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "expected"), [(1e12, (512, 64)), (1250.0, (512, 4)), (250.0, (128, 1)), (0.0, (1, 1))]
)
def test_auto_is_the_largest_power_of_two_that_the_estimates_allow(free: float, expected: tuple[int, int]) -> None:
    from omegaconf import OmegaConf

    from sdd.stages import fitting

    settings = {"accelerator": "cpu", "micro_batch_tokens": "auto", "inference_batch_size": "auto"}
    configs = [OmegaConf.create({"trainer": dict(settings), "evaluation": {"batch_size": 7}}) for _ in range(2)]

    def memory() -> float:
        trainer = configs[0].trainer
        return float(max(trainer.micro_batch_tokens, 200 * trainer.inference_batch_size))

    fitting.fit(configs, memory, lambda: free)
    for config in configs:
        assert (config.trainer.micro_batch_tokens, config.trainer.inference_batch_size) == expected
        assert config.evaluation.batch_size == 7, "a number stays"
