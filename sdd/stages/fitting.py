"""How much goes into a pass where a setting is `auto`: the most that a dry run's estimates let into free memory.

Powers of two, so that the same machine mostly comes to the same number; sums of other sizes are rounded otherwise. What
it came to is in the log, and in the manifests in the place of `auto`. Estimates are rough: a pass that does not fit
after all is halved (`sdd.forward.memory`).
"""

import logging
from collections.abc import Callable, Sequence

from omegaconf import DictConfig, OmegaConf

from sdd.config.checks import AUTO
from sdd.planning.requirements import size

log = logging.getLogger(__name__)

SHARE = 0.8
"""Of the free memory that estimates may take."""
MOST = {"cpu": (512, 64), "gpu": (16_384, 256)}
"""Padded tokens of a training pass, and rows of others, at most; on a CPU more are no faster (`conf/trainer`)."""
UNSEEN = 80e9
"""Bytes of a GPU that is not here."""


def free_memory(accelerator: str) -> float:
    """Bytes that are free where passes run: on the visible GPU, or in this machine."""
    import psutil
    import torch

    if accelerator == "cpu":
        return float(psutil.virtual_memory().available)
    return float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else UNSEEN


def is_asked(config: DictConfig) -> bool:
    return any(OmegaConf.select(config, key) == "auto" for key in AUTO)


def fit(configs: Sequence[DictConfig], memory: Callable[[], float], free: Callable[[], float]) -> None:
    """Put numbers in the place of `auto` in configs of one job; `memory` is what its artifacts take at most as they
    stand.

    Each is as large as the others at their least allow: what takes most is one pass, whose size one of them says.
    """
    asked = [key for key in AUTO if any(OmegaConf.select(config, key) == "auto" for config in configs)]
    if not asked:
        return
    places = {key: [one for one in configs if OmegaConf.select(one, key) == "auto"] for key in asked}

    def put(key: str, value: int) -> None:
        for config in places[key]:
            OmegaConf.update(config, key, value)

    chosen, room = {}, free()
    for key in asked:
        put(key, 1)
    for key in asked:
        value = MOST[configs[0].trainer.accelerator][0 if key.endswith("tokens") else 1]
        put(key, value)
        while value > 1 and memory() > SHARE * room:
            value //= 2
            put(key, value)
        chosen[key] = value
        put(key, 1)
    for key, value in chosen.items():
        put(key, value)
        log.info("%s=auto: %d, with %s of memory free", key, value, size(room))
