"""Losses and gradients of a global batch, however it is cut and padded, against the model's own."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from peft import LoraConfig, get_peft_model

from sdd.finetuning.losses.weighted import Weighted, built
from sdd.finetuning.module import (
    Optimisation,
    StudentModule,
    TrainingRow,
    labelled,
    loss_sum,
    micro_batches,
    step_rows,
    target_tokens,
)
from sdd.forward import chunks
from sdd.models.checkpoints import Checkpoint

LENGTHS = [(5, 9), (3, 4), (8, 30), (2, 3), (6, 17), (4, 22)]


@pytest.fixture(scope="module")
def rows() -> list[TrainingRow]:
    """(prompt, whole) lengths as above; the losses of long and short targets weigh differently."""
    rng = random.Random(0)
    return [TrainingRow([1, *(rng.randint(6, 250) for _ in range(whole - 1))], prompt) for prompt, whole in LENGTHS]


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return Checkpoint(tiny_llama).model("float32")


def own_loss(model: Any, rows: Sequence[TrainingRow]) -> torch.Tensor:
    """The mean over target tokens that the model computes itself from `labels`."""
    ids, mask, labels = labelled(rows)
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def adapted(folder: Path, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(Checkpoint(folder).model("float32"), config)


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
    lengths = [row.longest for row in rows]
    cut = micro_batches(lengths, max_tokens)
    assert sorted(at for micro in cut for at in micro) == list(range(len(rows)))
    for micro in cut:
        assert len(micro) == 1 or len(micro) * max(lengths[at] for at in micro) <= max_tokens
    assert len(micro_batches(lengths, 10_000)) == 1


def test_labels_stand_on_the_target_alone() -> None:
    ids, mask, labels = labelled([TrainingRow([1, 5, 6, 7], 2), TrainingRow([1, 8], 1), TrainingRow([1, 9, 9], 3)])
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


# ---- logit distillation -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(sharded_llama: Path) -> Any:
    """Another random model over the same vocabulary."""
    return Checkpoint(sharded_llama).model("float32").requires_grad_(False)


def distillation(teacher: Any, temperature: float = 1.0, ce_share: float = 0.0) -> Weighted:
    return built({"forward_kl": 1 - ce_share, "cross_entropy": ce_share}, {"temperature": temperature}, teacher)


def direct_loss(model: Any, teacher: Any, rows: Sequence[TrainingRow], temperature: float = 1.0) -> torch.Tensor:
    """KL(teacher || student) summed over target tokens, from both models' own logits of every position."""
    ids, mask, labels = labelled(rows)
    at = labels[:, 1:] != -100
    p, q = (
        (each(input_ids=ids, attention_mask=mask).logits[:, :-1][at] / temperature).softmax(-1)
        for each in (teacher, model)
    )
    return (p * (p.log() - q.log())).sum() * temperature**2


@pytest.mark.parametrize(("temperature", "ce_share"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3), (1.0, 1.0)])
def test_logit_distillation_is_the_formula_on_target_tokens(
    temperature: float, ce_share: float, tiny_llama: Path, teacher: Any, rows: list[TrainingRow]
) -> None:
    """Value and gradient; LoRA's first matrix would have no gradient at the start, so it has been moved."""
    student = adapted(tiny_llama)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trained = [p for p in student.parameters() if p.requires_grad]
    loss, count = distillation(teacher, temperature, ce_share)(student.get_base_model(), rows)
    assert count == target_tokens(rows)
    expected = (1 - ce_share) * direct_loss(student, teacher, rows, temperature)
    expected = expected + ce_share * own_loss(student, rows) * count
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.item() > 10
    for found, own in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True):
        assert torch.allclose(found, own, rtol=1e-3, atol=1e-3)
        assert float(own.abs().max()) > 1e-2


def test_a_student_that_is_its_teacher_has_nothing_to_learn(model: Any, rows: list[TrainingRow]) -> None:
    assert float(distillation(model)(model, rows)[0]) == pytest.approx(0, abs=1e-4)


def test_logits_of_both_models_are_there_for_one_chunk_of_target_tokens_only(
    model: Any, teacher: Any, rows: list[TrainingRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 16)
    shapes: list[int] = []
    hooks = [
        each.lm_head.register_forward_pre_hook(lambda module, given: shapes.append(len(given[0])))
        for each in (model, teacher)
    ]
    with torch.no_grad():
        distillation(teacher)(model, rows)
    for hook in hooks:
        hook.remove()
    assert max(shapes) == 16
    assert sum(shapes) == 2 * target_tokens(rows)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("distilled", [False, True], ids=["sft", "distilled"])
def test_a_loss_in_chunks_has_the_value_and_the_gradients_of_the_whole(
    distilled: bool,
    method: str,
    tiny_llama: Path,
    teacher: Any,
    rows: list[TrainingRow],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """57 targets in chunks of 16, forward and again backward; with `full`, the head's gradient is a sum over them."""
    whole = Checkpoint(tiny_llama).model("float32").requires_grad_(True)
    student = adapted(tiny_llama) if method == "lora" else whole
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model = student.get_base_model() if method == "lora" else student
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    loss_of = distillation(teacher, 2.0, 0.3) if distilled else loss_sum
    positions = target_tokens(rows)
    shapes: list[int] = []
    model.lm_head.register_forward_pre_hook(lambda module, given: shapes.append(len(given[0])))

    def taken(most_logits: int, chunk: int) -> tuple[float, tuple[torch.Tensor, ...]]:
        shapes.clear()
        monkeypatch.setattr(chunks, "MOST_LOGITS", most_logits)
        monkeypatch.setattr(chunks, "CHUNK_TOKENS", chunk)
        loss, count = loss_of(model, rows)
        assert count == positions
        return loss.item(), torch.autograd.grad(loss, list(trained.values()))

    at_once = positions * model.config.vocab_size
    expected, gradients = taken(at_once, positions)
    assert set(shapes) == {positions}
    assert len(shapes) == (2 if distilled else 1), "a loss in one piece is not made twice"
    value, in_chunks = taken(at_once - 1, 16)
    assert sorted(shapes) == sorted([16, 16, 16, positions - 48] * 2)
    assert value == pytest.approx(expected, rel=1e-6)
    for name, gradient, own in zip(trained, in_chunks, gradients, strict=True):
        assert torch.allclose(gradient, own, rtol=1e-4, atol=1e-5 * float(own.abs().max())), name
    assert max(float(own.abs().max()) for own in gradients) > 1e-2


@pytest.mark.filterwarnings("ignore")
def test_the_teacher_is_frozen_and_no_part_of_the_module(
    tiny_llama: Path, teacher: Any, rows: list[TrainingRow]
) -> None:
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    plan = [[0, 1, 2], [3, 4, 5]]
    module, gradients = trained(tiny_llama, rows, plan, validation=rows[:2], loss=distillation(teacher))
    assert len(gradients) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not any(p.grad is not None for p in teacher.parameters())
    assert set(module.state_dict()) == {f"student.{name}" for name in module.student.state_dict()}
    fresh = adapted(tiny_llama)
    per_token = float(direct_loss(fresh, teacher, rows[:3])) / target_tokens(rows[:3])
    assert module.history[0]["loss"] == pytest.approx(per_token, rel=1e-4)
    after = float(direct_loss(module.student.eval(), teacher, rows[:2])) / target_tokens(rows[:2])
    assert module.history[-1]["validation_loss"] == pytest.approx(after, rel=1e-4)
    masked = [TrainingRow([1, 5, 6], 3)]
    loss, count = distillation(teacher)(fresh.get_base_model(), masked)
    assert (loss.item(), count) == (0.0, 0)
    loss.backward()


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
    loss: Any = loss_sum,
) -> tuple[StudentModule, list[dict[str, torch.Tensor]]]:
    gradients = Gradients()
    optimisation = Optimisation(learning_rate, 0.0, 0.25, clip_norm, seed, len(plan), len(plan))
    module = StudentModule(
        adapted(folder, dropout), rows, plan, validation, optimisation, micro_batch_tokens, on_step=on_step, loss=loss
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
    untouched = Checkpoint(tiny_llama).model("float32").state_dict()
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
