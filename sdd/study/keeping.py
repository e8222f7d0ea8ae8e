"""A share of the parameters to keep, as the number of blocks that go: `pruning.keep` becomes `pruning.size`."""

import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

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


def with_size(config: DictConfig, models: Models) -> DictConfig:
    """The config with as many blocks to remove as `pruning.keep` allows, as if that number had been given."""
    if (share := config.pruning.keep) is None:
        return config
    shape, resolved = shape_of(models.sizes), config.copy()
    resolved.pruning.size, resolved.pruning.keep = blocks_to_remove(share, models.sizes), None
    kept = shape.parameters(shape.blocks - resolved.pruning.size) / shape.parameters()
    message = "pruning.keep=%g: %d of %d blocks go, %.1f%% of the parameters stay"
    log.info(message, share, resolved.pruning.size, shape.blocks, 100 * kept)
    return resolved
