"""The most memory that a process held, bytes.

Not `ru_maxrss` of a process that something large started: over exec Linux keeps the peak of the process that forked, so
that a small one seems as large as what started it. VmHWM is that of its own image; and a command is started by a
process that holds next to nothing.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

UNIT = 1 if sys.platform == "darwin" else 1024
"""Of `ru_maxrss`, bytes."""
STATUS = Path("/proc/self/status")
SMALL = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
wall, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, wall, used.ru_utime + used.ru_stime, used.ru_maxrss]))
"""


@dataclass(frozen=True)
class Used:
    """By a command and what it waited for: seconds on the wall and of the processor, and the most that one held."""

    wall: float
    cpu: float
    memory: float


def own_peak() -> float:
    """Of this process so far."""
    if STATUS.is_file():
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024.0
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT)


def used_by(command: Sequence[str], environment: Mapping[str, str]) -> Used:
    """It must end well."""
    words = [sys.executable, "-S", "-c", SMALL, *command]
    done = subprocess.run(words, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    code, wall, cpu, memory = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return Used(wall, cpu, memory * UNIT)
