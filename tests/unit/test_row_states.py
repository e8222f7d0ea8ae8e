"""What one pass leaves for the next: the states themselves, and nothing where they are not all there."""

import errno
from pathlib import Path

import pytest
import torch

from sdd.forward import chunks
from sdd.forward.row_states import RowStates
from sdd.importance import sample_gradients
from sdd.importance.channels import SDM, TaylorWidth
from sdd.models.checkpoints import Checkpoint

FULL = Path("/dev/full")
LENGTHS = [3, 1, 4, 2]
ROWS = [[5, 9, 31, 200, 7, 12, 90, 41], [3, 2, 77], [8, 8, 100, 101, 102, 55], [250, 4], [6, 7, 8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_are_read_as_they_were_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    kept, states = RowStates(LENGTHS, tmp_path), torch.randn(4, 4, 5).to(dtype)
    assert kept.of([0]) is None
    assert kept.keep([2, 0], states[[2, 0]])
    assert kept.of([0, 1]) is None
    found = kept.of([0, 2])
    assert found is not None and found.dtype == dtype
    assert torch.equal(found[0, :3], states[0, :3]) and not found[0, 3:].any()
    assert torch.equal(found[1], states[2])
    assert kept.keep([1], states[[1], :1]) and kept.keep([3], states[[3]])
    found = kept.of(range(4))
    assert found is not None
    for row, length in enumerate(LENGTHS):
        assert torch.equal(found[row, :length], states[row, :length]) and not found[row, length:].any()
    size = kept.end
    assert kept.keep([0, 3], 2 * states[[0, 3]]) and kept.end == size, "once is enough"
    assert list(tmp_path.iterdir()) == [], "the file has no name"


def test_too_many_states_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, states = RowStates(LENGTHS, tmp_path), torch.randn(1, 3, 5)
    monkeypatch.setattr(chunks, "KEPT_STATES", 10 * 5 * 4 - 1)
    assert not kept.keep([0], states) and kept.of([0]) is None
    monkeypatch.setattr(chunks, "KEPT_STATES", 10 * 5 * 4)
    assert kept.keep([0], states) and kept.of([0]) is not None


def test_a_full_disk_ends_the_keeping(tmp_path: Path) -> None:
    kept, states = RowStates(LENGTHS, tmp_path), torch.randn(1, 3, 5)
    assert kept.keep([0], states)
    kept.file = FULL.open("wb")
    with pytest.raises(OSError) as refusal:
        kept.keep([2], torch.randn(1, 4, 5))
    assert refusal.value.errno == errno.ENOSPC
    assert kept.of([0]) is None and not kept.keep([0], states) and kept.file.closed


def test_the_second_stage_reads_what_the_first_passed(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit what it would say by itself; what was not passed is, and is left for the next."""
    passed, original = list[int](), sample_gradients._states

    def counted(model: object, ids: torch.Tensor) -> torch.Tensor:
        passed.append(len(ids))
        return original(model, ids)

    monkeypatch.setattr(sample_gradients, "_states", counted)
    model, first, second = Checkpoint(tiny_llama).model("float32"), TaylorWidth(), SDM(0.1, 0.4, 0.5)
    first.final_states = RowStates([len(row) for row in ROWS], tmp_path)
    stage1 = first.measure(model, ROWS, 16)
    assert passed == []
    expected = second.measure(model, ROWS, 16, stage1)
    assert sum(passed) == len(ROWS)
    some = RowStates([len(row) for row in ROWS], tmp_path)
    for number in (3, 1):  # 1 is passed together with 2
        left = first.final_states.of([number])
        assert left is not None
        some.keep([number], left)
    for second.final_states, times in ((first.final_states, 0), (some, 2), (some, 0)):
        passed.clear()
        found = second.measure(model, ROWS, 16, stage1)
        assert len(passed) == times
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    full = RowStates([len(row) for row in ROWS], tmp_path)
    full.file = FULL.open("wb")
    second.final_states = full
    found = second.measure(model, ROWS, 16, stage1)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
