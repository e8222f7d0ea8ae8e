"""States of frozen blocks that are read back: those of the whole pass, and only where nothing below can differ."""

import errno
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdd.finetuning.adapters import adapted, causal_lm
from sdd.finetuning.module import TrainingRow, loss_sum
from sdd.finetuning.prefix import frozen_blocks, frozen_states
from sdd.forward import chunks
from sdd.models.checkpoints import Checkpoint

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}
ROWS = [TrainingRow([1, *range(6, 6 + length)], 3) for length in (9, 23, 5, 17)]
SHOWN = [len(row.ids) for row in ROWS], lambda number: ROWS[number].ids
ALONE = SHOWN[0][:1], SHOWN[1]


def student(folder: Path, places: list[int] | None, adapter: dict[str, Any] = LORA) -> Any:
    torch.manual_seed(0)
    made = adapted(Checkpoint(folder).model("float32", attention="eager"), adapter, places).train()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return made


def gradients(student: Any, rows: Sequence[TrainingRow]) -> tuple[float, list[torch.Tensor]]:
    loss, _ = loss_sum(causal_lm(student), rows)
    return loss.item(), list(torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad]))


@pytest.mark.parametrize("places", [[1], [2, 3], [1, 3]], ids=str)
def test_loss_and_gradients_from_kept_states_are_those_of_the_whole_pass(
    places: list[int], tiny_llama: Path, tmp_path: Path
) -> None:
    """Bit for bit where they were made in passes of the same shape, else to rounding; nothing below is computed."""
    made = student(tiny_llama, places)
    model = causal_lm(made)
    assert frozen_blocks(model) == places[0]
    alone, together = (frozen_states(model, *SHOWN, tmp_path, tokens) for tokens in (1, 60))
    assert alone is not None
    assert together is not None
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    passed: list[int] = []
    for number, block in enumerate(model.get_decoder().layers):
        block.mlp.register_forward_hook(lambda module, given, out, number=number: passed.append(number))
    for states, rows in ((alone, ROWS[:1]), (alone, ROWS[1:2]), (alone, ROWS), (together, ROWS[1:]), (together, ROWS)):
        expected = gradients(made, rows)
        passed.clear()
        with states.standing_in([ROWS.index(row) for row in rows], "cpu"):
            loss, found = gradients(made, rows)
        assert passed == list(range(places[0], 4))
        assert loss == pytest.approx(expected[0], rel=1e-6)
        scale = max(float(gradient.abs().max()) for gradient in expected[1])
        assert scale > 1e-2
        for one, other in zip(found, expected[1], strict=True):
            assert torch.equal(one, other) if len(rows) == 1 else torch.allclose(one, other, atol=1e-6 * scale)
    assert gradients(made, ROWS[:1])[0] == gradients(made, ROWS[:1])[0], "blocks are as they were"


@pytest.mark.parametrize("method", ["lora", "head_and_norms", "full"])
def test_with_the_first_block_or_anything_outside_of_blocks_trained_nothing_is_kept(
    method: str, tiny_llama: Path, sharded_llama: Path, tmp_path: Path
) -> None:
    for folder in (tiny_llama, sharded_llama):
        model = causal_lm(student(folder, [0, 3] if method == "lora" else None, LORA | {"method": method}))
        assert frozen_blocks(model) == 0
        assert frozen_states(model, *ALONE, tmp_path, 100) is None
    above = causal_lm(student(sharded_llama, [2]))
    above.get_output_embeddings().requires_grad_(True)
    assert frozen_blocks(above) == 0


def test_no_states_are_kept_that_dropout_below_would_change(tiny_llama: Path, tmp_path: Path) -> None:
    dropping = student(tiny_llama, [2], LORA | {"dropout": 0.5})
    assert frozen_states(causal_lm(dropping), *ALONE, tmp_path, 100) is not None, "only above"
    causal_lm(dropping).get_decoder().layers[1].self_attn.attention_dropout = 0.5
    assert frozen_states(causal_lm(dropping), *ALONE, tmp_path, 100) is None


def test_states_that_are_too_many_or_do_not_fit_are_not_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = causal_lm(student(tiny_llama, [2]))
    size = 4 * 32 * sum(SHOWN[0])
    monkeypatch.setattr(chunks, "KEPT_STATES", size - 1)
    assert frozen_states(model, *SHOWN, tmp_path, 100) is None
    monkeypatch.setattr(chunks, "KEPT_STATES", size)
    assert frozen_states(model, *SHOWN, tmp_path, 100) is not None

    def full(**named: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    assert frozen_states(model, *SHOWN, tmp_path, 100) is None
    assert "No space left on device; what is frozen is passed in every step" in caplog.text
