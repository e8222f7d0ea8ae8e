"""Width criteria on hand-made tensors, and the Taylor importances against the formula written out naively."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, LlamaConfig, Phi3Config

from sdd.forward.losses import distillation_slope, softened
from sdd.importance.channels import (
    SDM,
    ActivationWidth,
    MagnitudeWidth,
    RandomWidth,
    TaylorWidth,
    activation_norm,
    glu_magnitude,
    kept_channels,
)
from sdd.importance.sample_gradients import coupled_saliency
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint

ROWS = [[5, 9, 31, 200, 7, 12, 90, 41], [3, 2, 77], [8, 8, 100, 101, 102, 55], [250, 4], [6, 7, 8, 9, 10, 11, 12, 13]]

# ---- pure functions ---------------------------------------------------------------------------------------------


def test_terms_are_added_before_the_absolute_value() -> None:
    """Channel 0: |1*2 - 2*1| and |0*1 + 1*3|, mean 1.5; channel 1: |-1 + 0.5| and |4 - 4|, mean 0.25."""
    up, down = torch.tensor([[1.0, 0.0], [-1.0, 2.0]]), torch.tensor([[-2.0, 1.0], [0.5, -1.0]])
    weights = [torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.tensor([[1.0, 3.0], [1.0, 4.0]])]
    assert coupled_saliency([up, down], weights).tolist() == [1.5, 0.25]
    assert coupled_saliency([up], weights[:1]).tolist() == [1.0, 2.5]


def test_magnitude_is_the_product_of_norms_and_no_scale_between_matrices_fools_it() -> None:
    gate, up = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    down = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    assert glu_magnitude([gate, up], down).tolist() == [10.0, 10.0]
    scale = torch.tensor([8.0, 0.5])
    assert glu_magnitude([gate, up * scale[:, None]], down / scale).tolist() == pytest.approx([10.0, 10.0])
    assert glu_magnitude([up], down).tolist() == [2.0, 10.0]


def test_activation_norm_is_taken_over_texts() -> None:
    assert activation_norm(torch.tensor([[3.0, 0.0], [4.0, 1.0]])).tolist() == [5.0, 1.0]


def test_most_important_channels_are_kept_in_order() -> None:
    assert kept_channels([0.1, 5.0, 3.0, 5.0], 2) == [1, 3]
    assert kept_channels([1.0, 1.0, 1.0, 2.0], 2) == [0, 3], "the first of equals"


def test_random_channels_differ_between_blocks_and_follow_the_seed() -> None:
    a, b = RandomWidth(0).draw(2, 40)
    assert a != b and sorted(a) == sorted(b) == [float(rank) for rank in range(40)]
    assert RandomWidth(0).draw(2, 40) == [a, b]
    assert RandomWidth(1).draw(2, 40) != [a, b]


@pytest.mark.parametrize(
    ("ratio", "of", "alpha", "temperature"),
    [
        *((0.2, "all", 0.4, 0.2), (0.1, "all", 0.4, 0.2), (0.3, "all", 0.42, 0.5), (0.9, "all", 0.1, 0.2)),
        *((0.3, "mlp", 0.4, 0.2), (0.45, "mlp", 0.42, 0.5)),
    ],
)
def test_papers_settings_at_the_nearest_ratio(ratio: float, of: str, alpha: float, temperature: float) -> None:
    assert SDM().resolved(ratio, of) == {"first_cut": 0.025, "alpha": alpha, "temperature": temperature}
    assert SDM(0.1, alpha=0.5).resolved(ratio, of) == {"first_cut": 0.1, "alpha": 0.5, "temperature": temperature}


def test_small_cut_masks_the_least_important_channels() -> None:
    masks = SDM(0.4).masked([torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0]), torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])])
    assert [mask.nonzero().flatten().tolist() for mask in masks] == [[1, 2], [0, 1]]
    assert [int(mask.sum()) for mask in SDM(0.0).masked([torch.ones(40)])] == [1], "at least one"


def test_slope_of_the_loss_is_its_derivative() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_(True)
    targets = torch.tensor([0, 6, 3, 3])
    for alpha, t in [(0.4, 0.2), (1.0, 1.0), (0.0, 0.5)]:
        loss = _token_losses(student, teacher, targets, alpha, t).sum()
        (expected,) = torch.autograd.grad(loss, student)
        assert torch.allclose(
            distillation_slope(student, softened(teacher, t), targets, alpha).double(), expected, atol=1e-6
        )
    (plain,) = torch.autograd.grad(torch.nn.functional.cross_entropy(student, targets, reduction="sum"), student)
    assert torch.allclose(distillation_slope(student, None, targets, 0.0).double(), plain, atol=1e-6)


def test_slope_is_zero_where_student_and_teacher_agree() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0]])
    assert distillation_slope(logits, softened(logits, 1.0), torch.tensor([0]), 1.0).abs().max() < 1e-7


# ---- against the formula, sample by sample with all gradients ---------------------------------------------------


def _token_losses(student: Tensor, teacher: Tensor, targets: Tensor, alpha: float, t: float) -> Tensor:
    hard = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    soft = (teacher / t).softmax(-1)
    divergence = (soft * (soft.log() - student.log_softmax(-1))).sum(-1)
    return (1 - alpha) * hard + alpha * divergence


def naive(folder: Path, masks: Any = None, alpha: float = 0.0, t: float = 1.0, teacher: Path | None = None) -> Any:
    """One sample after the other, autograd for every parameter, channels masked by zeros in the down projection."""
    model, uncut = Checkpoint(folder).model("float32"), Checkpoint(teacher or folder).model("float32")
    matrices = [_matrices(block.mlp) for block in checkpoints.blocks(model)]
    if masks is not None:
        for block, mask in zip(checkpoints.blocks(model), masks, strict=True):
            _down(block.mlp).weight.data[:, mask] = 0
    totals = [0.0] * len(matrices)
    for row in ROWS:
        ids = torch.tensor([row])
        model.zero_grad()
        student = model(ids).logits[0, :-1]
        with torch.no_grad():
            soft = uncut(ids).logits[0, :-1]
        _token_losses(student, soft, ids[0, 1:], alpha, t).mean().backward()
        for block, parts in enumerate(matrices):
            totals[block] = totals[block] + sum(view(p.grad * p) for p, view in parts).abs()
    return [total.mean(dim=1).detach() for total in totals]


def _down(mlp: Any) -> Any:
    return mlp.dense_4h_to_h if hasattr(mlp, "dense_4h_to_h") else mlp.down_proj


def _matrices(mlp: Any) -> list[tuple[Any, Callable[[Tensor], Tensor]]]:
    """A channel's matrices, and how each shows its channels as rows."""
    parts: list[tuple[Any, Callable[[Tensor], Tensor]]] = [(_down(mlp).weight, lambda x: x.t())]
    if hasattr(mlp, "gate_up_proj"):
        return [*parts, (mlp.gate_up_proj.weight, lambda x: x[:48] + x[48:])]
    names = ["dense_h_to_4h"] if hasattr(mlp, "dense_h_to_4h") else ["gate_proj", "up_proj"]
    return parts + [(getattr(mlp, name).weight, lambda x: x) for name in names]


@pytest.fixture(scope="module")
def families(
    tmp_path_factory: pytest.TempPathFactory, save_random: Callable[..., Path], sizes: dict[str, Any], tiny_llama: Path
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    sizes = sizes | {"num_hidden_layers": 2}
    return {
        "gated": tiny_llama,
        "gated with bias": save_random(root / "bias", LlamaConfig(**sizes, mlp_bias=True)),
        "fused": save_random(root / "fused", Phi3Config(**sizes, tie_word_embeddings=False)),
        "plain with bias": save_random(root / "plain", GPTNeoXConfig(**sizes)),
    }


FAMILIES = ["gated", "gated with bias", "fused", "plain with bias"]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        scale = float(other.max())
        assert scale > 1e-4
        assert (one - other.double()).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_one_equals_the_formula(family: str, families: dict[str, Path]) -> None:
    model, expected = Checkpoint(families[family]).model("float32"), naive(families[family])
    for max_tokens in (1, 16, 1000):
        assert_equal(TaylorWidth().measure(model, ROWS, max_tokens), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_two_equals_the_formula(family: str, families: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdd.importance.sample_gradients.HEAD_ELEMENTS", 2000)  # logits of two or three tokens
    folder = families[family]
    model = Checkpoint(folder).model("float32")
    first = TaylorWidth().measure(model, ROWS, 16)
    criterion = SDM(0.1, alpha=0.4, temperature=0.5)
    masks = criterion.masked(first)
    found = criterion.measure(model, ROWS, 16, first)
    assert_equal(found, naive(folder, masks, 0.4, 0.5))
    for importance, mask in zip(found, masks, strict=True):
        assert importance[mask].tolist() == [0.0] * 5
        assert importance[~mask].min() > 0
    assert any((one - other).abs().max() > 1e-3 * other.max() for one, other in zip(found, first, strict=True))


def test_teacher_of_its_own(families: dict[str, Path]) -> None:
    """Where blocks went first, the student has fewer of them than the teacher."""
    student, teacher = families["gated with bias"], families["gated"]
    model, uncut = Checkpoint(student).model("float32"), Checkpoint(teacher).model("float32")
    criterion = SDM(0.1, alpha=0.4, temperature=0.5)
    first = TaylorWidth().measure(model, ROWS, 16)
    expected = naive(student, criterion.masked(first), 0.4, 0.5, teacher)
    assert_equal(criterion.measure(model, ROWS, 16, first, uncut), expected)


def test_model_is_left_as_it_was(families: dict[str, Path]) -> None:
    model, ids = Checkpoint(families["gated"]).model("float32"), torch.tensor([ROWS[0]])
    before = model(ids).logits
    criterion = SDM(0.1, 0.4, 0.5)
    criterion.measure(model, ROWS, 16, TaylorWidth().measure(model, ROWS, 16))
    assert torch.equal(model(ids).logits, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_activations_are_the_mean_of_what_enters_the_down_projection(families: dict[str, Path]) -> None:
    model = Checkpoint(families["gated"]).model("float32")
    found = ActivationWidth().measure(model, ROWS, 16)
    caught: list[Tensor] = []
    mlp = checkpoints.blocks(model)[2].mlp
    handle = mlp.register_forward_pre_hook(
        lambda module, arguments: caught.append(
            module.act_fn(module.gate_proj(arguments[0])) * module.up_proj(arguments[0])
        )
    )
    with torch.no_grad():
        for row in ROWS:
            model(torch.tensor([row]))
    handle.remove()
    expected = sum(one[0].abs().mean(dim=0).double() ** 2 for one in caught).sqrt()
    assert torch.allclose(found[2], expected, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_reads_the_stored_weights(family: str, families: dict[str, Path]) -> None:
    model = Checkpoint(families[family]).model("float32")
    found = MagnitudeWidth().read(Checkpoint(families[family]))
    for block, importance in zip(checkpoints.blocks(model), found, strict=True):
        if family == "fused":
            into = list(block.mlp.gate_up_proj.weight.chunk(2))
        elif family == "plain with bias":
            into = [block.mlp.dense_h_to_4h.weight]
        else:
            into = [block.mlp.gate_proj.weight, block.mlp.up_proj.weight]
        expected = _down(block.mlp).weight.double().pow(2).sum(0).sqrt()
        for matrix in into:
            expected = expected * matrix.double().pow(2).sum(1).sqrt()
        assert torch.allclose(importance, expected)
