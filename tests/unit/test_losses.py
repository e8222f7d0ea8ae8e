"""The loss on logits done by hand."""

import math

import pytest
import torch

from sdd.forward.losses import forward_kl, forward_kl_sum, summed_in_chunks, target_loss_sum


def test_a_sum_in_nats_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [math.log(3), 0.0]])
    targets = torch.tensor([0, 0, 1])
    expected = math.log(2) + math.log(4 / 3) + math.log(4)
    assert target_loss_sum(logits, targets).item() == pytest.approx(expected, rel=1e-6)


def test_certainty_costs_nothing_and_no_target_costs_zero() -> None:
    assert target_loss_sum(torch.tensor([[200.0, 0.0]]), torch.tensor([0])).item() == 0
    empty = torch.zeros(0, 5, requires_grad=True)
    loss = target_loss_sum(empty, torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()


def test_the_sum_is_taken_in_float32() -> None:
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(300) % 50
    loss = target_loss_sum(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(target_loss_sum(logits.double(), targets).item(), rel=1e-5)


# ---- forward KL -------------------------------------------------------------------------------------------------


def drawn(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_divergence_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2; the other way round it is another number."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    forward, reverse = 0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert forward_kl_sum(student, teacher).item() == pytest.approx(forward, rel=1e-5)
    assert forward_kl_sum(teacher, student).item() == pytest.approx(reverse, rel=1e-5)
    assert abs(forward - reverse) > 0.01


def test_divergence_of_each_token_by_hand() -> None:
    p = torch.log(torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    q = torch.log(torch.tensor([[0.25, 0.75], [0.25, 0.75]]))
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert forward_kl(q, p).tolist() == pytest.approx([expected, 0.0], abs=1e-7)
    assert forward_kl(q - 3.0, p + 5.0).tolist() == pytest.approx([expected, 0.0], abs=1e-6)
    assert float(forward_kl(p, q)[0]) != pytest.approx(expected, abs=1e-3)
    assert float(forward_kl(q, p).sum()) == pytest.approx(float(forward_kl_sum(q, p)), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_against_the_formula(temperature: float) -> None:
    student, teacher = drawn(40, 30, 0), drawn(40, 30, 1)
    p, q = ((each.double() / temperature).softmax(-1) for each in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum().item()
    assert forward_kl_sum(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert expected > 1


def test_no_divergence_and_no_gradient_at_equality() -> None:
    student = drawn(20, 30, 0).requires_grad_()
    loss = forward_kl_sum(student, student.detach() + 7.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-6


def test_the_gradient_is_what_the_student_gives_too_much() -> None:
    student, teacher = drawn(5, 8, 0).requires_grad_(), drawn(5, 8, 1)
    forward_kl_sum(student, teacher).backward()
    assert student.grad is not None
    assert torch.allclose(student.grad, student.detach().softmax(-1) - teacher.softmax(-1), atol=1e-6)


def test_no_position_and_half_precision() -> None:
    empty = torch.zeros(0, 5, requires_grad=True)
    loss = forward_kl_sum(empty, torch.zeros(0, 5))
    assert loss.item() == 0
    loss.backward()
    student, teacher = drawn(300, 50, 0).bfloat16(), drawn(300, 50, 1).bfloat16()
    assert forward_kl_sum(student, teacher).dtype == torch.float32
    expected = forward_kl_sum(student.float(), teacher.float()).item()
    assert forward_kl_sum(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_vocabularies_of_two_sizes_are_never_broadcast() -> None:
    with pytest.raises(AssertionError, match="teacher"):
        forward_kl_sum(torch.zeros(3, 5), torch.zeros(3, 1))


@pytest.mark.parametrize("rows", [0, 1, 4, 11])
def test_chunks_leave_sum_and_gradients_as_they_are(rows: int) -> None:
    """At most four rows go through the head at once; also in the backward pass, where they go through it again."""
    head = drawn(30, 6, 2).requires_grad_()
    states, teacher = drawn(rows, 6, 0).requires_grad_(), drawn(rows, 30, 1)
    seen: list[int] = []

    def loss(states: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        seen.append(len(states))
        return forward_kl_sum(states @ head.T, teacher)

    found = summed_in_chunks(loss, states, teacher, chunk=4)
    gradients = torch.autograd.grad(found, (head, states))
    assert max(seen) <= 4
    assert sum(seen) == 2 * rows
    whole = loss(states, teacher)
    assert found.item() == pytest.approx(whole.item(), rel=1e-5)
    for gradient, expected in zip(gradients, torch.autograd.grad(whole, (head, states)), strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
