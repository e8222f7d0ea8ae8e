"""A student, and its teacher, in shards: every rank has its part of each tensor, and the whole of one block at a time.

PyTorch's `fully_shard` (FSDP2, after Zhao et al. 2023, arXiv 2304.11277): a block's parameters are gathered for its
passes and let go of after them; gradients are summed over the ranks and scattered, and each rank steps its own part.
Gathering takes all ranks, so that each goes through as many passes as the others. Checkpoints hold whole tensors, as
without shards, and any number of ranks goes on from them. Knows nothing of the loss or the store.
"""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any, TypeVar

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sdd.finetuning.adapters import causal_lm
from sdd.models.checkpoints import blocks

T = TypeVar("T")


class Shards(torch.nn.Module):
    """Models in shards. What is done with them is done in this module's forward, where embeddings and head are whole:
    a loss calls parts of a model, and not its forward."""

    def __init__(self, *models: Any) -> None:
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def split(self, mesh: Any) -> None:
        """Leave each rank its part, block by block; what lies on the CPU goes to the rank's device on the way."""
        for model in self.models:
            for block in blocks(causal_lm(model)):
                fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # losses are divided by the global batch's tokens already
                module.set_force_sum_reduction_for_comms(True)  # gloo sums, and knows no other reduction

    def forward(self, work: Callable[[], T]) -> T:
        return work()

    def within(self, work: Callable[[], T]) -> T:
        """What `work()` comes to; all ranks have to call it, and with gradients a backward pass has to follow."""
        result: T = self(work)
        if not torch.is_grad_enabled():  # else the backward pass does it
            self.reshard()  # type: ignore[operator]
        return result


def whole(tensor: Any) -> Tensor:
    """A tensor of which this rank may have a part; all ranks have to ask for it."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    assert isinstance(tensor, Tensor), type(tensor)
    return tensor


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """This rank's part of a tensor that all ranks have, split as `like` is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gather_trained(model: torch.nn.Module, keep: bool) -> None:
    """Make what is trained whole again, on the CPU of the rank that keeps it, to be saved by stock code."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, DTensor) or not parameter.requires_grad:
                continue
            if id(parameter) not in made:  # tied ones stay one
                tensor = whole(parameter.detach())
                made[id(parameter)] = torch.nn.Parameter(tensor.cpu() if keep else tensor.new_empty(0))
            module._parameters[name] = made[id(parameter)]


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for a module that splits itself, with checkpoints that one process writes and reads."""

    def __init__(self, ranks: int) -> None:
        super().__init__(data_parallel_size=ranks, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module: Any = self.lightning_module
        return {name: self._written(parameter.detach()) for name, parameter in module.trained().items()}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state: dict[str, Any] = optimizer.state_dict()
        return state | {
            "state": {
                index: {
                    key: self._written(value) if isinstance(value, Tensor) else value for key, value in moments.items()
                }
                for index, moments in state["state"].items()
            }
        }

    def _written(self, tensor: Any) -> Tensor:
        """A tensor, whole, on the CPU of the process that writes checkpoints; a machine would not hold one for each."""
        gathered = whole(tensor)
        return gathered.cpu() if self.is_global_zero else torch.empty(0)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = Strategy.load_checkpoint(self, checkpoint_path, weights_only)
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module: Any = self.lightning_module
        with torch.no_grad():
            for name, parameter in module.trained().items():
                parameter.copy_(part_of(checkpoint["state_dict"][name], parameter))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        module: Any = self.lightning_module
        trained = list(module.trained().values())
        (state,) = map(copy, checkpoint["optimizer_states"])
        state["state"] = {
            index: {key: part_of(value, trained[index]) if value.dim() else value for key, value in moments.items()}
            for index, moments in state["state"].items()
        }
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": [state]})
