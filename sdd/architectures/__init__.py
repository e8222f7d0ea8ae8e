"""What is known of architectures, in one place: names of blocks, what configs say of single ones, how logits end.

What is not known is derived: lists per block are those that stock code makes of the config, and whether a cut is right
is read off the module tree, built without memory before and after the cut. A block that would change its kind, window,
position coding or scale by moving to another place, where no config entry can say otherwise, is refused, never bent.
Knows nothing of weights, files or scores.
"""

from sdd.architectures.configs import (
    BLOCK_NAME,
    HEADS,
    STORED_BUFFERS,
    attention_for,
    check_kind,
    cut_config,
    explicit_config,
    stock_config,
)
from sdd.architectures.mlps import MLP, check_width, find_mlp, mlp_layers, mlp_of, mlp_shape
from sdd.architectures.refitting import refittable
from sdd.architectures.trees import block_list, check_cut, check_shapes, scaled, skeleton
from sdd.architectures.values import is_tokenizer

__all__ = [
    "BLOCK_NAME",
    "HEADS",
    "MLP",
    "STORED_BUFFERS",
    "attention_for",
    "block_list",
    "check_cut",
    "check_kind",
    "check_shapes",
    "check_width",
    "cut_config",
    "explicit_config",
    "find_mlp",
    "is_tokenizer",
    "mlp_layers",
    "mlp_of",
    "mlp_shape",
    "refittable",
    "scaled",
    "skeleton",
    "stock_config",
]
