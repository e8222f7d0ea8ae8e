"""What a stranger may send, and the canaries that tell whether it did any harm.

Each case of a table is one hostile input. It must be refused in one line, or be harmless: no code of it ran (`ran` does
not exist), no file outside was touched (`outside` is as it was), nothing secret was written or printed.
"""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from canaries import LIMIT, SECRET, Canaries


@pytest.fixture
def canaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Canaries]:
    work, outside = tmp_path / "work", tmp_path / "outside.txt"
    work.mkdir()
    outside.write_text(f"{SECRET} outside\n")
    monkeypatch.setenv("SDD_SECRET", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    timer = threading.Timer(LIMIT, lambda: os._exit(70))  # a case that hangs ends the run, and says where it was
    timer.daemon = True
    timer.start()
    yield Canaries(work, tmp_path / "ran", outside)
    timer.cancel()
