"""vLLM in this process, an optional package: whether it is here, and computes on the device that is asked for."""

import os
from importlib.util import find_spec

from sdd.errors import UserError
from sdd.models.spread import Spread


def check_vllm(asked_by: str, device: str | Spread, instead: str) -> None:
    """Refuse what cannot work, before anything is opened; a build of vLLM computes on one kind of device."""
    if find_spec("vllm") is None:
        raise UserError(f"{asked_by} needs the package vllm; run: pip install 'vllm==0.32.*', or choose {instead}")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    if device == "cpu" and not current_platform.is_cpu():
        raise UserError(f"{asked_by} needs a GPU with this build of vLLM; add trainer=gpu, or choose {instead}")
    if device != "cpu" and current_platform.is_cpu():
        raise UserError(f"{asked_by}: this build of vLLM is one for CPUs; add trainer=cpu, or choose {instead}")
