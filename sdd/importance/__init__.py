"""What may go: criteria of blocks and of MLP channels, and how they look at a model."""

from sdd.importance.states import angular_distance, block_influence

__all__ = ["angular_distance", "block_influence"]
