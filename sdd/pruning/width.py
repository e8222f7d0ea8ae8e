"""Remove MLP channels from a checkpoint: one width for all blocks, so that stock `from_pretrained` opens the result.

A channel is a row of gate and up (and of their biases) and a column of down. How many stay follows from a share of the
parameters, of all of them as SDMPrune counts (arXiv 2506.11120) or of the MLPs' own. Knows nothing of criteria.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from sdd.architectures import BLOCK_NAME, MLP, check_width, explicit_config, find_mlp, mlp_shape
from sdd.errors import UserError
from sdd.models.checkpoints import Checkpoint
from sdd.pruning.depth import Part, check_names, write_checkpoint


@dataclass(frozen=True)
class Share:
    """How much to remove: `ratio` of all parameters or of the MLPs' (`of`), widths rounded to a `multiple`."""

    ratio: float
    of: str
    multiple: int

    def width(self, width: int, parameters: float, channel: float) -> int:
        """The width that is left of `width`, where a channel (of all blocks) has `channel` of `parameters` numbers."""
        setting = f"pruning.ratio={self.ratio:g} of {self.of} parameters"
        mlp_parameters = width * channel
        removed = self.ratio * (parameters if self.of == "all" else mlp_parameters)
        if removed >= mlp_parameters:
            share = f"{100 * mlp_parameters / parameters:.1f}%"
            raise UserError(f"{setting} is more than the MLPs hold ({share} of all); choose less, or prune blocks")
        kept = self.multiple * round((width - removed / channel) / self.multiple)
        if kept < 1:
            raise UserError(
                f"{setting} leaves no channel of {width} (in multiples of {self.multiple}); choose a smaller one, or a "
                "smaller pruning.multiple"
            )
        if kept >= width:
            raise UserError(
                f"{setting} removes no channel of {width} (in multiples of {self.multiple}); choose a larger one, or a "
                "smaller pruning.multiple"
            )
        return kept


@dataclass(frozen=True)
class Sizes:
    """Sizes of a stored checkpoint: all its parameters, those of its blocks, and those of one channel of all blocks."""

    parameters: int
    blocks: int
    num_blocks: int
    channel: int
    mlp: MLP

    def width(self, share: Share, blocks_removed: int = 0) -> int:
        """The width that is left; where blocks go first, with blocks of the mean size."""
        removed_share = blocks_removed / self.num_blocks
        return share.width(
            self.mlp.width, self.parameters - removed_share * self.blocks, self.channel * (1 - removed_share)
        )


def sizes_of(checkpoint: Checkpoint) -> Sizes:
    """What a width cut starts from; a user's mistake where the MLPs are not known. Reads headers only."""
    where, width = checkpoint.where, checkpoint.config.get("intermediate_size")
    if isinstance(width, list):
        raise UserError(f"{where}: its intermediate_size is a width for each block; not supported, prune blocks")
    check_names(checkpoint)
    stored = checkpoint.block_tensors
    blocks = {block: {name: tensor.shape for name, tensor in stored[block].items()} for block in sorted(stored)}
    mlp = find_mlp(blocks[0], where)
    for index, shapes in blocks.items():
        if find_mlp(shapes, where) != mlp:
            raise UserError(f"{where}: block {index} has another MLP than block 0; one width for all is not possible")
    if width != mlp.width:
        raise UserError(f"{where}: intermediate_size={width} in config.json, but the MLPs are {mlp.width} wide")
    narrower = {name: mlp_shape(mlp, f"layers.0.{name}", shape, mlp.width - 1) for name, shape in blocks[0].items()}
    channel = len(blocks) * sum(prod(shape) - prod(narrower[name]) for name, shape in blocks[0].items())
    in_blocks = sum(prod(shape) for shapes in blocks.values() for shape in shapes.values())
    return Sizes(checkpoint.num_parameters, in_blocks, len(blocks), channel, mlp)


def check_narrowable(checkpoint: Checkpoint, width: int) -> MLP:
    """The MLP of a checkpoint; a user's mistake where stock code could not open it with MLPs `width` wide."""
    where, mlp = checkpoint.where, sizes_of(checkpoint).mlp
    check_width(explicit_config(checkpoint.config, where), mlp, width, where, checkpoint.shapes)
    return mlp


def narrow_checkpoint(source: Checkpoint, target: Path, kept: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Write the checkpoint with the channels `kept` (sorted, equally many of every block) into the folder `target`.

    Returns the widths and parameters before and after (tied weights once), the share of FLOPs saved as arXiv 2410.09982
    counts it, and the share of all parameters and of the MLPs' that is gone.
    """
    width = len(kept[0])
    assert all(len(channels) == width for channels in kept), "one width for all blocks"
    mlp, sizes = check_narrowable(source, width), sizes_of(source)
    assert len(kept) == sizes.num_blocks, f"channels of {len(kept)} blocks for {sizes.num_blocks}"

    def change(name: str) -> Part:
        match = BLOCK_NAME.match(name)
        layer, _, kind = match["after"].removeprefix(".").rpartition(".") if match else ("", "", "")
        if match and layer in mlp.into:
            channels = kept[int(match["index"])]
            return Part(name, rows=[stack * mlp.width + c for stack in range(mlp.stacks) for c in channels])
        if match and layer == mlp.out and kind == "weight":
            return Part(name, columns=list(kept[int(match["index"])]))
        return Part(name)

    config = source.config | {"intermediate_size": width}
    write_checkpoint(source, target, change, config)
    before, after = sizes.parameters, Checkpoint(target).num_parameters
    return {
        "width_before": mlp.width,
        "width_after": width,
        "parameters_before": before,
        "parameters_after": after,
        "flops_saved": (before - after) / before,
        "removed_of_all": (before - after) / before,
        "removed_of_mlp": (mlp.width - width) / mlp.width,
    }
