"""Several workers on one machine: what a sweep takes by count, and who sees which GPU."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from sdd.cli.gpus import claim_gpus
from sdd.errors import UserError
from sdd.planning.side_by_side import seconds_of

SHARED = ("scores", 10.0)
JOBS = [[SHARED, (f"tuned {n}", 4.0)] for n in range(4)]


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (1, 10 + 4 * 4),
        (2, 10 + 2 * 4),  # the second waits for the scores, as for anything that another builds
        (4, 10 + 4),
        (9, 10 + 4),
    ],
)
def test_what_is_shared_is_built_once_and_waited_for(workers: int, expected: float) -> None:
    assert seconds_of(JOBS, workers) == expected


def test_what_exists_takes_nothing_and_no_job_no_time() -> None:
    assert seconds_of([[("scores", 0.0), ("tuned", 3.0)], [("scores", 0.0)]], 2) == 3
    assert seconds_of([], 2) == 0


CLAIM = """
import os, sys
from sdd.cli.gpus import claim_gpus
for _ in range(2):
    claim_gpus(int(sys.argv[1]))
print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
sys.stdin.read()
"""


def test_each_process_sees_a_gpu_of_its_own(tmp_path: Path) -> None:
    """As many as there are; then they are shared. One that ends gives its GPU back.

    Each is a shell with a temporary folder of its own. GPUs of another job of Slurm's are others, whatever their names.
    """
    names = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(names)}

    def started(devices: int = 1, **more: str) -> subprocess.Popen[str]:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        more["TMPDIR"] = str(tmp_path / str(uuid.uuid4()))
        Path(more["TMPDIR"]).mkdir()
        return subprocess.Popen([sys.executable, "-c", CLAIM, str(devices)], env=environment | more, **streams)  # type: ignore[call-overload]

    def seen(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    first, second = started(), started()
    kept, given_back = seen(first), seen(second)
    assert {kept, given_back} == set(names)
    third = started()
    assert seen(third) in names
    assert "are in use by other runs; this one shares some" in third.communicate()[1]
    of_a_job = started(2, SLURM_JOB_ID="1")
    assert sorted(seen(of_a_job).split(",")) == sorted(names)
    assert of_a_job.communicate()[1] == ""
    second.communicate()
    fourth = started()
    assert seen(fourth) == given_back
    both = started(2)
    assert sorted(seen(both).split(",")) == sorted(names)
    for process in (first, fourth, both):
        process.communicate()
        assert process.returncode == 0
    alone = started(2)
    assert sorted(seen(alone).split(",")) == sorted(names)
    alone.communicate()


def test_more_gpus_than_there_are_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(UserError, match=r"^trainer\.devices=3, but 2 GPUs are visible here; ask for at most as many$"):
        claim_gpus(3)
