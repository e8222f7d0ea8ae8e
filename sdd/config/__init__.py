"""The typed schema of the composed config, and the checks made before any work."""

from sdd.config.checks import CHOICES, MERGE_SETTINGS, check_pruning, check_values
from sdd.config.schema import Config, Groups, plain

__all__ = ["CHOICES", "MERGE_SETTINGS", "Config", "Groups", "check_pruning", "check_values", "plain"]
