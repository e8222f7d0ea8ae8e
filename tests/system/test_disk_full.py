"""A full disk is said in one line, loses no finished work, and the same command continues once there is room."""

import errno
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import files_of, run

from sdd.cli.app import explained
from sdd.store import STAGES


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/some/file"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["full", "quota", "safetensors"],
)
def test_full_disk_is_the_users_to_mend(error: Exception) -> None:
    code, message = explained(error)
    assert code == 2
    assert message.startswith("the disk is full")
    assert "\n" not in message


def test_where_a_copy_did_not_fit_is_said() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/from/tokenizer.json", None, "/to/tokenizer.json")
    assert "full at /to/tokenizer.json;" in explained(error)[1]


def test_other_failures_are_not_taken_for_it() -> None:
    assert explained(OSError(errno.EIO, "Input/output error"))[0] == 1
    assert explained(RuntimeError("something\nelse")) == (1, "RuntimeError: something")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own for the artifacts, in memory; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def test_full_disk_then_room_again(small: list[str], study: Path, small_disk: Path, tmp_path: Path) -> None:
    """Room is given out a little at a time, so that the disk fills up in every stage on the way."""
    words = [*small, f"paths.artifacts={small_disk}"]
    stopped: Counter[str] = Counter()
    for _ in range(60):
        outcome = run("evaluate", *words, cwd=tmp_path)
        if outcome.code == 0:
            break
        assert outcome.code == 2, outcome.stderr
        assert len(outcome.errors) == 1
        assert outcome.errors[0].startswith("error: the disk is full")
        assert outcome.stdout == ""
        stage = outcome.built[-1].split("/")[0]
        stopped[stage] += 1
        assert STAGES[stage].resumable or not list(small_disk.glob(f".partial/{stage}/*/*")), (
            "room taken by what is lost"
        )
        resize(small_disk, f"{used(small_disk) // 1024 + 4 * 2 ** stopped[stage]}k")
    assert outcome.path.is_dir()
    assert len(stopped) >= 4, stopped
    assert {"pruned", "tuned"} <= set(stopped)
    assert files_of(small_disk) == files_of(study / "artifacts")
