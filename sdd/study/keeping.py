"""A share of the parameters to keep, as the number of blocks that go: `pruning.keep` becomes `pruning.size`."""

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from sdd.errors import UserError
from sdd.planning.cost_model import shape_of
from sdd.study.models import Models

log = logging.getLogger(__name__)


def blocks_to_remove(share: float, sizes: Mapping[str, Any]) -> int:
    """The most blocks that can go, one staying, while at least that share (in (0, 1]) of all parameters stays."""
    shape = shape_of(sizes)
    enough = share * shape.parameters()
    return max(
        number for number in range(shape.blocks) if number == 0 or shape.parameters(shape.blocks - number) >= enough
    )


def with_size(config: DictConfig, models: Models, removed: int = 0) -> DictConfig:
    """The config with as many blocks to remove as `pruning.keep` allows, as if that number had been given.

    The share is of the unpruned model, of which `removed` blocks have gone before.
    """
    if (share := config.pruning.keep) is None:
        return config
    shape, resolved = shape_of(models.sizes), config.copy()
    gone = blocks_to_remove(share, models.sizes)
    if gone < removed:
        raise UserError(
            f"pruning.keep={share:g} is {gone} blocks of the unpruned model, and pruning.after removes {removed}"
        )
    resolved.pruning.size, resolved.pruning.keep = gone - removed, None
    kept = shape.parameters(shape.blocks - gone) / shape.parameters()
    message = "pruning.keep=%g: %d of %d blocks go, %.1f%% of the parameters stay"
    log.info(message, share, gone, shape.blocks, 100 * kept)
    return resolved
