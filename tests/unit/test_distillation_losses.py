"""Every loss against its formula, written out in float64 over the whole vocabulary; value and gradient."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from sdd import tiny
from sdd.finetuning.adapters import adapted
from sdd.finetuning.losses import LOSSES, weights_of
from sdd.finetuning.losses.hidden_states import squared
from sdd.finetuning.losses.relations import relation_kl
from sdd.finetuning.losses.taid import TAID
from sdd.finetuning.losses.weighted import Weighted, built
from sdd.finetuning.modes import MODES
from sdd.finetuning.module import Optimisation, StudentModule, TrainingRow, labelled, micro_batches
from sdd.forward import chunks
from sdd.models.checkpoints import Checkpoint, blocks
from sdd.stages.tuned import tokenized
from sdd.tiny.tasks import instances

SETTINGS: dict[str, Any] = {"skew": 0.3, "jsd_beta": 0.2, "taid_start": 0.4, "clip_mass": 0.7}


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)


def clipped(p: Tensor, targets: Tensor, mass: float) -> Tensor:
    """One token after the other, the likeliest first, until they hold the mass; the target always."""
    kept = torch.zeros_like(p)
    for row, (probabilities, target) in enumerate(zip(p.tolist(), targets.tolist(), strict=True)):
        held = 0.0
        for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
            if held < mass or token == target:
                kept[row, token] = 1.0
            held += probabilities[token]
    return p * kept / (p * kept).sum(-1, keepdim=True)


def dense(name: str, student: Tensor, teacher: Tensor, targets: Tensor, t: float) -> Tensor:
    p, q, one = (teacher / t).softmax(-1), (student / t).softmax(-1), student.softmax(-1)
    beta = SETTINGS["jsd_beta"]
    mixture, skewed = beta * p + (1 - beta) * q, SETTINGS["skew"] * p + (1 - SETTINGS["skew"]) * q
    formulas: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: -one[torch.arange(len(targets)), targets].log(),
        "forward_kl": lambda: t**2 * kl(p, q),
        "reverse_kl": lambda: t**2 * kl(q, p),
        "skew_kl": lambda: t**2 * kl(p, skewed),
        "jsd": lambda: t**2 * (beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)),
        "taid": lambda: t**2 * kl(((0.6 * student.detach() + 0.4 * teacher) / t).softmax(-1), q),
        "total_variation": lambda: (teacher.softmax(-1) - one).abs().sum(-1) / 2,
        "dac_kl": lambda: t**2 * kl(clipped(p, targets, SETTINGS["clip_mass"]), q),
        "redi": lambda: -one[torch.arange(len(targets)), targets].log(),
    }
    return formulas[name]()


ON_LOGITS = [name for name, loss in LOSSES.items() if loss.needs != "teacher states"]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", ON_LOGITS)
def test_a_loss_on_logits_is_its_formula(name: str, temperature: float) -> None:
    """Of each token and in sum, for a student far from its teacher; the gradient is the formula's."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(12, 17, generator=draw) for _ in range(2))
    targets = torch.randint(17, (12,), generator=draw)
    ((_, loss),) = built({name: 1.0}, SETTINGS | {"temperature": temperature}).terms
    found, own = student.clone().requires_grad_(), student.double().requires_grad_()
    expected = dense(name, own, teacher.double(), targets, temperature)
    losses = loss.per_token(found, teacher, targets)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), expected, rtol=1e-4, atol=1e-6)
    assert float(loss.total(student, teacher, targets)) == pytest.approx(float(expected.detach().sum()), rel=1e-5)
    (gradient,), (formula,) = (
        torch.autograd.grad(each.sum(), logits) for each, logits in ((losses, found), (expected, own))
    )
    assert torch.allclose(gradient.double(), formula, rtol=1e-3, atol=1e-5)
    assert float(formula.abs().max()) > 1e-2


@pytest.mark.parametrize("name", [name for name in ON_LOGITS if LOSSES[name].needs == "teacher logits"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name: str) -> None:
    """Also where a token has no probability at all; clipping the teacher leaves what it cuts off."""
    logits = torch.tensor([[2.0, 0.0, -1.0, -200.0], [0.0, 0.0, -300.0, 1.0]], requires_grad=True)
    ((_, loss),) = built({name: 1.0}, {"clip_mass": 1.0}).terms
    value = loss.total(logits, logits.detach() + 3.0, torch.tensor([0, 3]))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-6
    assert float(loss.total(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))) == 0


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_total_variation_is_a_policy_gradient_whatever_the_baseline(baseline: float) -> None:
    """Rewards of a token that the student draws: half where the teacher says it more often, minus half elsewhere."""
    draw = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(12, 17, generator=draw) for _ in range(2))
    policy = student.clone().requires_grad_()
    p, q = teacher.softmax(-1), student.softmax(-1)
    rewards = torch.where(p > q, 0.5, -0.5) - baseline
    (-(q * rewards * policy.log_softmax(-1)).sum()).backward()
    student.requires_grad_()
    ((_, loss),) = built({"total_variation": 1.0}, SETTINGS).terms
    loss.per_token(student, teacher, torch.zeros(12, dtype=torch.long)).sum().backward()
    assert student.grad is not None and policy.grad is not None and student.grad.abs().max() > 0.05
    torch.testing.assert_close(student.grad, policy.grad)


def test_between_forward_and_reverse() -> None:
    """At its ends the generalised divergence is either, in units of its weight; in the middle it is symmetric."""
    draw = torch.Generator().manual_seed(1)
    student, teacher = 0.5 * torch.randn(5, 9, generator=draw), 0.5 * torch.randn(5, 9, generator=draw)
    targets = torch.zeros(5, dtype=torch.long)

    def value(name: str, a: Tensor, b: Tensor, **settings: float) -> float:
        return float(built({name: 1.0}, settings).terms[0][1].total(a, b, targets))

    forward, reverse = (value(name, student, teacher) for name in ("forward_kl", "reverse_kl"))
    assert abs(forward - reverse) > 0.02
    assert value("jsd", student, teacher, jsd_beta=1e-3) / 1e-3 == pytest.approx(forward, rel=1e-2)
    assert value("jsd", student, teacher, jsd_beta=0.999) / 1e-3 == pytest.approx(reverse, rel=1e-2)
    assert value("jsd", student, teacher) == pytest.approx(value("jsd", teacher, student), rel=1e-6)
    assert value("skew_kl", student, teacher, skew=0.0) == pytest.approx(forward, rel=1e-6)


def test_the_interpolated_teacher_comes_nearer_by_hand() -> None:
    """A straight line of 10 steps from 0.4, which a loss that falls by half overtakes by 5e-4 sigmoid(m) (1 - t)."""
    loss = TAID()
    assert loss.t == 0.4
    loss.stepped(2.0, 0.0)
    first = 0.4 + 5e-4 * 0.5 * 0.6
    assert loss.t == pytest.approx(first, abs=1e-12)
    loss.stepped(1.0, 0.0)
    momentum = 0.01 * 0.5
    assert loss.t == pytest.approx(first + 5e-4 / (1 + math.exp(-momentum)) * (1 - first), abs=1e-12)
    for step in range(1, 11):
        loss.stepped(1.0, step / 10)
        assert loss.t >= 0.4 + 0.06 * step - 1e-12
    assert loss.t == 1.0
    other = TAID()
    other.restore(loss.state())
    assert other == loss


# ---- states -----------------------------------------------------------------------------------------------------


def test_squared_error_of_states_by_hand() -> None:
    teacher, student = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[3.0, 2.0], [0.0, 0.0]])
    assert squared(student, teacher).tolist() == pytest.approx([2 / 12.5, 1.0], rel=1e-5)
    assert squared(teacher, teacher).tolist() == [0.0, 0.0]


def test_relations_are_those_to_earlier_tokens_of_the_same_row() -> None:
    """Two heads of width 3, two rows of which one ends in a pad; token by token."""
    draw = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(2, 4, 6, generator=draw).double() for _ in range(2))
    student.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    found = relation_kl(student, teacher, mask, 3)
    expected = torch.zeros(2, 4, dtype=torch.double)
    for row, length in enumerate((4, 3)):
        for at in range(length):
            for head in (slice(0, 3), slice(3, 6)):
                p, q = (
                    (x[row, : at + 1, head] @ x[row, at, head] / math.sqrt(3)).softmax(-1) for x in (teacher, student)
                )
                expected[row, at] += kl(p, q) / 2
    assert torch.allclose(found[mask.bool()].double(), expected[mask.bool()], rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(found[mask.bool()].sum(), student, retain_graph=True)
    (formula,) = torch.autograd.grad(expected[mask.bool()].sum(), student)
    assert torch.allclose(gradient, formula, rtol=1e-3, atol=1e-5)
    assert float(formula.abs().max()) > 1e-2


# ---- together ---------------------------------------------------------------------------------------------------


ROWS = [
    TrainingRow([1, 9, 8, 7, 30, 31], 3),
    TrainingRow([1, 6, 40, 41, 42], 2, rejected=[1, 6, 50, 51, 52, 53, 54]),
    TrainingRow([1, 60, 61], 1, rejected=[1, 70]),
]


@pytest.fixture(scope="module")
def models(tiny_llama: Path, sharded_llama: Path) -> tuple[Any, Any]:
    """A student, and as its teacher another random model of the same sizes."""
    student, teacher = (Checkpoint(folder).model("float32") for folder in (tiny_llama, sharded_llama))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return student.requires_grad_(True), teacher.requires_grad_(False)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def states_after_blocks(model: Any, rows: Sequence[TrainingRow]) -> list[Tensor]:
    """Of the tokens from which targets are predicted, before the last norm."""
    ids, mask, labels = labelled(rows)
    caught: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
    hidden = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    handle.remove()
    return [each[:, :-1][labels[:, 1:] != -100] for each in (*hidden[1:-1], caught[0])]


def test_states_are_compared_block_by_block_through_the_cut(models: tuple[Any, Any], tiny_llama: Path) -> None:
    """The student keeps blocks 0, 1 and 3 of a teacher of four: its third is compared with the teacher's fourth."""
    _, teacher = models
    student = Checkpoint(tiny_llama).model("float32").requires_grad_(True)
    del student.model.layers[2]
    kept = [0, 1, 3]
    loss, count = built({"hidden_states": 2.0}, {}, teacher, kept)(student, ROWS)
    own, taught = states_after_blocks(student, ROWS), states_after_blocks(teacher, ROWS)
    pairs = [(state, taught[place]) for state, place in zip(own, kept, strict=True)]
    expected = 2 * torch.stack([((s - t).square().mean(-1) / t.square().mean(-1)).sum() for s, t in pairs]).sum()
    assert count == 8
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    found, formula = (gradients(student, each) for each in (loss, expected))
    for name, gradient in formula.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


def test_rejected_answers_are_left_and_every_row_counts_alike(models: tuple[Any, Any]) -> None:
    student, _ = models
    loss, count = built({"redi": 1.0}, {"rejected_weight": 0.5})(student, ROWS)

    def mean_log(ids: list[int], first: int) -> Tensor:
        logits = student(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return torch.stack([logits[at - 1, ids[at]] for at in range(first, len(ids))]).mean()

    expected = -torch.stack([mean_log(row.ids, row.prompt_length) for row in ROWS]).sum()
    for row in ROWS:
        expected = expected + (0.5 * mean_log(row.rejected, row.prompt_length) if row.rejected else 0.0)
    assert count == 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, formula = (gradients(student, each) for each in (loss, expected))
    for name, gradient in formula.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max())), name


@pytest.mark.parametrize("chunk", [3, 256])
@pytest.mark.parametrize("beside", ["total_variation", "redi", "relations"])
def test_two_losses_add_up_by_their_weights(
    chunk: int, beside: str, models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = models
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", chunk)
    settings: tuple[Any, ...] = {}, teacher, [0, 1, 2, 3]
    both = built({"reverse_kl": 0.25, beside: 2.0}, *settings)
    alone = [built({name: 1.0}, *settings) for name in ("reverse_kl", beside)]
    if beside == "redi":  # then every row counts alike, whatever is minimised
        alone[0] = Weighted([(1.0, alone[0].terms[0][1]), (0.0, alone[1].terms[0][1])], teacher)
    (first, counted), (second, _) = (loss(student, ROWS) for loss in alone)
    together, count = both(student, ROWS)
    assert count == both.count(ROWS) == counted == (3 if beside == "redi" else 8)
    assert together.item() == pytest.approx(0.25 * first.item() + 2 * second.item(), rel=1e-5)
    assert min(first.item(), second.item()) != 0


# ---- training ---------------------------------------------------------------------------------------------------

CUT = list(range(2, 10))


@pytest.fixture(scope="module")
def taught() -> tuple[Any, list[TrainingRow]]:
    """The embedded model, and two rows of its tasks of which one has a rejected answer."""
    checkpoint = Checkpoint(Path(tiny.__file__).parent / "teacher")
    rows = [
        {"prompt": task.prompt, "target": task.reference, "rejected": task.reference[::-1] if number % 2 else None}
        for number, task in enumerate(instances("pool", 3, 2))
    ]
    model = checkpoint.model("float32").requires_grad_(False)
    return model, tokenized(checkpoint.tokenizer(), rows, None, 256)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_the_pruned_embedded_model(mode: str, taught: tuple[Any, list[TrainingRow]]) -> None:
    """Two steps on the same rows, in two passes each; its own loss falls."""
    teacher, rows = taught
    kept = [place for place in range(len(blocks(teacher))) if place not in CUT]
    student = deepcopy(teacher)
    for place in reversed(CUT):
        del student.model.layers[place]
    student.config.num_hidden_layers = len(kept)
    torch.manual_seed(0)
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}
    weights = weights_of(MODES[mode].loss, 0.0, None)
    loss = built(weights, SETTINGS, teacher if any(LOSSES[name].needs_teacher for name in weights) else None, kept)
    plan = [[0, 1]] * 2
    optimisation = Optimisation(3e-3, 0.0, 0.0, 1.0, 0, len(plan), 1)
    module = StudentModule(adapted(student, lora, None), rows, plan, rows[:1], optimisation, 1, loss=loss)
    options: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, max_epochs=-1, enable_model_summary=False, **options)
    trainer.fit(module)
    losses = [row["loss"] for row in module.history]
    assert len(micro_batches([row.longest for row in rows], 1)) > 1
    assert all(math.isfinite(value) for row in module.history for value in row.values() if value is not None)
    assert losses[0] != 0
    assert losses[1] < losses[0] or mode == "taid", "the target of TAID moves away"
    assert list(module.loss_state()) == (["t", "momentum", "previous"] if mode == "taid" else [])


def test_the_weights_that_a_config_means() -> None:
    assert weights_of(None, 0.3, None) == {"cross_entropy": 1.0}
    assert weights_of({"forward_kl": 1.0}, 0.25, None) == {"forward_kl": 0.75, "cross_entropy": 0.25}
    assert weights_of({"cross_entropy": 1.0, "relations": 1.0}, 0.25, None) == {"cross_entropy": 1.0, "relations": 1.0}
    assert weights_of({"forward_kl": 1.0}, 0.0, "jsd") == {"jsd": 1.0}
    assert weights_of(None, 0.0, {"jsd": 1, "redi": 0.5}) == {"jsd": 1.0, "redi": 0.5}
