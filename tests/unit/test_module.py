"""Losses and gradients of a global batch, however it is cut and padded, against the model's own."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model

from sdd import models
from sdd.module import (
    Optimisation,
    StudentModule,
    TrainingRow,
    loss_sum,
    micro_batches,
    padded,
    step_rows,
    target_tokens,
)

LENGTHS = [(5, 9), (3, 4), (8, 30), (2, 3), (6, 17), (4, 22)]


@pytest.fixture(scope="module")
def rows() -> list[TrainingRow]:
    """(prompt, whole) lengths as above; the losses of long and short targets weigh differently."""
    rng = random.Random(0)
    return [TrainingRow([1, *(rng.randint(6, 250) for _ in range(whole - 1))], prompt) for prompt, whole in LENGTHS]


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return models.load_model(tiny_llama, "float32")


def own_loss(model: Any, rows: Sequence[TrainingRow]) -> torch.Tensor:
    """The mean over target tokens that the model computes itself from `labels`."""
    ids, mask, labels = padded(rows)
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def adapted(folder: Path, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(models.load_model(folder, "float32"), config)


# ---- rows and batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_rows", "batch_size", "epochs"), [(10, 4, 3), (8, 4, 2), (3, 8, 2), (1, 1, 1)])
def test_every_epoch_takes_each_row_once(num_rows: int, batch_size: int, epochs: int) -> None:
    plan = step_rows(num_rows, batch_size, epochs, seed=7)
    per_epoch = -(-num_rows // batch_size)
    assert len(plan) == per_epoch * epochs
    for epoch in range(epochs):
        steps = plan[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(row for step in steps for row in step) == list(range(num_rows))
        assert all(len(step) == batch_size for step in steps[:-1])


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    plan = step_rows(20, 4, 2, seed=7)
    assert step_rows(20, 4, 2, seed=7) == plan
    assert step_rows(20, 4, 1, seed=7) == plan[:5]
    assert plan[:5] != plan[5:]
    assert step_rows(20, 4, 2, seed=8) != plan


@pytest.mark.parametrize("max_tokens", [1, 20, 45, 10_000])
def test_micro_batches_hold_every_row_within_bounds(max_tokens: int, rows: list[TrainingRow]) -> None:
    cut = micro_batches(rows, max_tokens)
    assert sorted((row.ids for micro in cut for row in micro), key=len) == sorted((row.ids for row in rows), key=len)
    for micro in cut:
        assert len(micro) == 1 or len(micro) * max(len(row.ids) for row in micro) <= max_tokens
    assert len(micro_batches(rows, 10_000)) == 1


def test_labels_stand_on_the_target_alone() -> None:
    ids, mask, labels = padded([TrainingRow([1, 5, 6, 7], 2), TrainingRow([1, 8], 1), TrainingRow([1, 9, 9], 3)])
    assert ids.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0], [1, 9, 9, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert labels.tolist() == [[-100, -100, 6, 7], [-100, 8, -100, -100], [-100] * 4]


# ---- losses -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_and_batching_leave_every_sequences_loss_unchanged(model: Any, rows: list[TrainingRow]) -> None:
    alone = []
    for row in rows:
        loss, count = loss_sum(model, [row])
        assert count == len(row.ids) - row.prompt_length
        assert float(loss) == pytest.approx(float(own_loss(model, [row])) * count, rel=1e-5)
        alone.append(float(loss))
    together, count = loss_sum(model, rows)
    assert count == target_tokens(rows) == sum(whole - prompt for prompt, whole in LENGTHS)
    assert float(together) == pytest.approx(sum(alone), rel=1e-5)
    assert float(together) / count == pytest.approx(float(own_loss(model, rows)), rel=1e-5)
    mean_of_means = sum(loss / (len(row.ids) - row.prompt_length) for loss, row in zip(alone, rows, strict=True)) / 6
    assert mean_of_means != pytest.approx(float(together) / count, rel=1e-2), "the case cannot tell the means apart"


def test_logits_are_computed_at_target_positions_only(model: Any, rows: list[TrainingRow]) -> None:
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_pre_hook(lambda module, arguments: shapes.append(tuple(arguments[0].shape)))
    loss_sum(model, rows)
    assert shapes == [(target_tokens(rows), model.config.hidden_size)]


def test_a_batch_without_targets_has_a_finite_loss_and_gradient(tiny_llama: Path) -> None:
    student = adapted(tiny_llama)
    loss, count = loss_sum(student.get_base_model(), [TrainingRow([1, 5, 6], 3), TrainingRow([1, 5], 2)])
    assert (loss.item(), count) == (0.0, 0)
    (loss / max(count, 1)).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in student.parameters() if p.grad is not None)


# ---- training ---------------------------------------------------------------------------------------------------


class Gradients(pl.Callback):
    """Notes the gradients that an optimiser step is about to use."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.student.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def trained(
    folder: Path,
    rows: list[TrainingRow],
    plan: list[list[int]],
    micro_batch_tokens: int = 64,
    clip_norm: float = 1e9,
    validation: Sequence[TrainingRow] = (),
    seed: int = 0,
    dropout: float = 0.0,
    learning_rate: float = 1e-2,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[StudentModule, list[dict[str, torch.Tensor]]]:
    gradients = Gradients()
    optimisation = Optimisation(learning_rate, 0.0, 0.25, clip_norm, seed, len(plan), len(plan))
    module = StudentModule(
        adapted(folder, dropout), rows, plan, validation, optimisation, micro_batch_tokens, on_step=on_step
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=len(plan),
        max_epochs=-1,
        logger=False,
        callbacks=[gradients],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module, gradients.steps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10_000])
def test_the_gradient_is_that_of_one_big_batch(
    micro_batch_tokens: int, tiny_llama: Path, rows: list[TrainingRow]
) -> None:
    module, (gradients,) = trained(tiny_llama, rows, [list(range(6))], micro_batch_tokens)
    student = adapted(tiny_llama)
    loss = own_loss(student, rows)
    loss.backward()
    expected = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-6), name
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
    assert module.history[0]["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_clipped_once_for_the_global_batch(tiny_llama: Path, rows: list[TrainingRow]) -> None:
    plan = [list(range(6))]
    (free,), (clipped,) = (trained(tiny_llama, rows, plan, 1, clip_norm=c)[1] for c in (1e9, 0.1))
    norm = torch.cat([gradient.flatten() for gradient in free.values()]).norm()
    assert norm > 0.1
    for name, gradient in free.items():
        assert torch.allclose(clipped[name], gradient * 0.1 / norm, rtol=1e-3, atol=1e-7), name


@pytest.mark.filterwarnings("ignore")
def test_steps_take_the_rows_of_the_plan_and_the_rate_of_the_schedule(
    tiny_llama: Path, rows: list[TrainingRow]
) -> None:
    """Warm-up over the first quarter of eight steps, then a cosine to zero; the module ends where the plan does."""
    plan = [[0], [1, 2], [3], [4], [5], [0, 1], [2], [3, 4]]
    told: list[int] = []
    module, _ = trained(tiny_llama, rows, plan, on_step=lambda step, logged: told.append(step))
    assert told == [row["step"] for row in module.history] == list(range(1, 9))
    rates = [row["learning_rate"] for row in module.history]
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.01])
    assert rates[5] == pytest.approx(0.005)
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 1e-3
    with torch.no_grad():
        before = adapted(tiny_llama)
        assert module.history[0]["loss"] == pytest.approx(float(own_loss(before, [rows[0]])), rel=1e-5)
    assert module.history[-1]["epoch"] == 1.0


@pytest.mark.filterwarnings("ignore")
def test_only_the_adapter_is_trained_and_validation_is_without_dropout(
    tiny_llama: Path, rows: list[TrainingRow]
) -> None:
    module, _ = trained(tiny_llama, rows[:4], [[0, 1], [2, 3]] * 2, validation=rows[4:], dropout=0.5)
    untouched = models.load_model(tiny_llama, "float32").state_dict()
    for name, tensor in module.causal_lm.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, untouched[name.replace(".base_layer", "")]), name
    assert [row["validation_loss"] is not None for row in module.history] == [True] * 4
    assert module.student.training, "dropout is on again after validation"
    with torch.no_grad():
        expected = float(own_loss(module.student.eval(), rows[4:]))
    assert module.history[-1]["validation_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_step_without_any_target_changes_nothing(tiny_llama: Path) -> None:
    masked = [TrainingRow([1, 5, 6], 3), TrainingRow([1, 7], 2)]
    module, _ = trained(tiny_llama, masked, [[0, 1]], validation=masked)
    assert module.history[0]["loss"] == module.history[0]["validation_loss"] == 0.0
    fresh = adapted(tiny_llama).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in module.student.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_dropout_is_a_function_of_seed_and_step(tiny_llama: Path, rows: list[TrainingRow]) -> None:
    plan = [[0, 1], [2, 3], [4, 5]]
    losses = [
        [row["loss"] for row in trained(tiny_llama, rows, plan, seed=seed, dropout=0.5, learning_rate=0.1)[0].history]
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
