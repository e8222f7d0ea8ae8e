"""MLPs by the names of their linear layers: what a channel is in them, and what a narrower one looks like."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdd.architectures.configs import BLOCK_NAME
from sdd.architectures.trees import block_list, check_shapes, differing, skeleton
from sdd.errors import UserError

MLPS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("up_proj",), "down_proj", 1),
    (("dense_h_to_4h",), "dense_4h_to_h", 1),
    (("c_fc",), "c_proj", 1),
    (("fc1",), "fc2", 1),
)
"""Linear layers of an MLP: those into its channels, the one out of them, and how often each of the first holds all
channels: Llama and its kin, Phi-3's gate above up in one matrix, Nemotron, GPT-NeoX, StarCoder2, Phi."""

DOWN = tuple({out for _, out, _ in MLPS})
"""Names of the linear layer that ends an MLP."""


@dataclass(frozen=True)
class MLP:
    """A block's MLP by the names of its linear layers within the block, and its sizes.

    A channel is a row of every layer in `into` (of each of its `stacks` parts) and a column of `out`.
    """

    into: tuple[str, ...]
    out: str
    stacks: int
    width: int
    hidden: int


def find_mlp(shapes: Mapping[str, tuple[int, ...]], where: str) -> MLP:
    """The MLP of a block, from its parameters' names (within the block) and shapes; an unknown one is refused.

    Mixtures of experts have several, or matrices of three dimensions, and no width that is one number.
    """
    mlps = []
    for into, out, stacks in MLPS:
        for name, shape in shapes.items():
            parent, layer = _split(name.removesuffix(".weight"))
            names = tuple(parent + linear for linear in into)
            fitting = name.endswith(".weight") and layer == out and len(shape) == 2
            if fitting and all(shapes.get(f"{linear}.weight") == (stacks * shape[1], shape[0]) for linear in names):
                mlps.append(MLP(names, parent + out, stacks, shape[1], shape[0]))
    # Gate and up together hold the plain form's two names as well.
    mlps = [mlp for mlp in mlps if not any(set(mlp.into) < set(other.into) for other in mlps)]
    if len(mlps) != 1 or any("expert" in name for name in shapes):
        kind = "a mixture of experts" if any("expert" in name for name in shapes) else "linear layers of other names"
        raise UserError(f"{where}: its MLP is not known here ({kind}), so no channel can be removed; prune blocks")
    return mlps[0]


def _split(name: str) -> tuple[str, str]:
    """`mlp.up_proj` -> (`mlp.`, `up_proj`)."""
    parent, dot, layer = name.rpartition(".")
    return parent + dot, layer


def check_width(
    config: dict[str, Any], mlp: MLP, width: int, where: str, stored: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Refuse a width cut after which stock code would make another model than the one with narrower MLPs.

    `config` is explicit; every block holds the layers of `mlp`; `stored` are the shapes of the tensors, if they are to
    be those of the config. Seconds at most, whatever the size of the model.
    """
    whole = skeleton(config, where)
    if stored is not None:
        check_shapes(whole, stored, where)
    narrow = skeleton(config | {"intermediate_size": width}, where)
    expected = {name: mlp_shape(mlp, name, shape, width) for name, shape in block_shapes(whole)}
    if difference := differing(expected, dict(block_shapes(narrow))):
        raise UserError(f"{where}: stock code makes other blocks of a narrower MLP ({difference}); not pruned")


def block_shapes(model: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter of a model."""
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def mlp_shape(mlp: MLP, name: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The shape that a parameter, by its full name, has where MLPs are `width` wide."""
    match = BLOCK_NAME.match(name)
    layer, _, kind = match["after"].removeprefix(".").rpartition(".") if match else ("", "", "")
    if layer in mlp.into:
        return (mlp.stacks * width, *shape[1:])
    return (shape[0], width) if layer == mlp.out and kind == "weight" else shape


def mlp_layers(block: Any, mlp: MLP) -> tuple[list[Any], Any]:
    """The linear modules of a block's MLP: those into its channels, and the one out of them."""
    return [block.get_submodule(name) for name in mlp.into], block.get_submodule(mlp.out)


def mlp_of(model: Any) -> MLP:
    """The MLP that the blocks of a causal LM share."""
    shapes = {name: tuple(parameter.shape) for name, parameter in block_list(model)[0].named_parameters()}
    return find_mlp(shapes, type(model).__name__)
