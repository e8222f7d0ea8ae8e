"""A job's own GPUs: the workers of a sweep, or several shells on one machine, each see those that no other uses."""

import getpass
import logging
import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from sdd.errors import UserError

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
_claims: dict[str, FileLock] = {}
"""The GPUs that this process holds, until it ends."""


def claim_gpus(devices: int) -> None:
    """Leave so many of the visible GPUs visible to this process. Call it before anything asks CUDA.

    Where other processes of this project hold too many of them, some are shared.
    """
    names = _visible()
    if 0 < len(names) < devices:
        raise UserError(f"trainer.devices={devices}, but {len(names)} GPUs are visible here; ask for at most as many")
    if len(names) < 2 or len(_claims) >= devices:
        return
    for name in names:
        if len(_claims) == devices:
            break
        claim = FileLock(Path(tempfile.gettempdir()) / f"sdd-{getpass.getuser()}-gpu-{name}.lock")
        try:
            claim.acquire(timeout=0)
        except Timeout:
            continue
        _claims[name] = claim
    chosen, free = list(_claims), [name for name in names if name not in _claims]
    if missing := devices - len(chosen):
        start = os.getpid() % len(free)
        chosen += [*free[start:], *free[:start]][:missing]
        log.warning(
            "GPUs of %s are in use by other runs; this one shares some: %s", ", ".join(names), ", ".join(chosen)
        )
    else:
        log.info("GPU %s of %s", ", ".join(chosen), ", ".join(names))
    os.environ[VISIBLE] = ",".join(chosen)


def _visible() -> list[str]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` has them or would."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
