"""A job's own GPUs: the workers of a sweep, or several shells on one machine, each see those that no other uses.

A claim is a socket's name without a file (Linux's abstract names): all users of a machine share these, whatever their
temporary folder, and a claim ends with its process. A container has names of its own unless it has the host's network.
"""

import logging
import os
import socket

from sdd.errors import UserError

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
SCHEDULED = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")
"""What names a scheduler's job: it has GPUs of its own, and may number them from 0 as others do theirs."""
_claims: dict[str, socket.socket] = {}
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
        if claim := _claim(name):
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


def _claim(name: str) -> socket.socket | None:
    """What holds a GPU as long as it is open; None where another process has it."""
    job = next((os.environ[key] for key in SCHEDULED if key in os.environ), "")
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0sdd-gpu-{job}-{name}")
    except OSError:
        claim.close()
        return None
    return claim


def _visible() -> list[str]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` has them or would."""
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
