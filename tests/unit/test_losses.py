"""The loss on logits done by hand."""

import math

import pytest
import torch

from sdd.losses import target_loss_sum


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
