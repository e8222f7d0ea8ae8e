"""One GPU a process: the workers of a sweep, or several shells on one machine, each see one that no other uses."""

import getpass
import logging
import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
_claims: list[FileLock] = []
"""What this process holds, until it ends."""


def claim_gpu() -> None:
    """Leave one of the visible GPUs visible to this process. Call it before anything asks CUDA.

    Where other processes of this project hold them all, one is shared.
    """
    names = _visible()
    if len(names) < 2 or _claims:
        return
    for name in names:
        claim = FileLock(Path(tempfile.gettempdir()) / f"sdd-{getpass.getuser()}-gpu-{name}.lock")
        try:
            claim.acquire(timeout=0)
        except Timeout:
            continue
        _claims.append(claim)
        os.environ[VISIBLE] = name
        log.info("GPU %s of %s", name, ", ".join(names))
        return
    os.environ[VISIBLE] = names[os.getpid() % len(names)]
    log.warning("all GPUs (%s) are in use by other runs; this one shares GPU %s", ", ".join(names), os.environ[VISIBLE])


def _visible() -> list[str]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` has them or would."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
