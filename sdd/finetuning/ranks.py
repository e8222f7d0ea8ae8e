"""Fine-tuning by several processes, one a device: each takes its share of a step's micro-batches, gradients are summed.

A process holds the whole student. Since losses are sums over target tokens, divided by those of the whole global batch,
the sum of the ranks' gradients is the gradient of one process; it rounds otherwise.
"""

import logging
import multiprocessing
import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from sdd.errors import UserError

LIBRARIES = ["sdd.finetuning.module", "transformers", "peft"]
BUCKET = 1 << 24
"""Numbers that are summed together."""


class SummedGradients(DDPStrategy):
    """Lightning's DDP around a module that sums its own gradients, once a step and not at every micro-batch."""

    def configure_ddp(self) -> None:
        """The module stays bare: the wrapper would average after every backward pass."""


def is_rank() -> bool:
    """Whether this process is one of several that train together."""
    return "LOCAL_RANK" in os.environ


def rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def number() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Over all ranks, in place; one that a rank has no gradient of counts as zero there."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET:
            _sum(bucket)
            bucket = []
    if bucket:
        _sum(bucket)


def _sum(gradients: Sequence[Tensor]) -> None:
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(whole)
    for gradient, summed in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def summed(values: Sequence[float], device: Any) -> list[float]:
    """Each value's sum over all ranks."""
    whole = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(whole)
    return [float(value) for value in whole]


def gathered(own: Mapping[int, list[int]], count: int, device: Any) -> list[list[int]]:
    """`count` rows of token ids in order, of which every rank has some by their number."""
    if number() == 1:
        return [own[index] for index in range(count)]
    lengths = torch.zeros(count, dtype=torch.int64, device=device)
    for index, tokens in own.items():
        lengths[index] = len(tokens)
    dist.all_reduce(lengths)
    whole = torch.zeros(count, int(lengths.max()), dtype=torch.int64, device=device)
    for index, tokens in own.items():
        whole[index, : len(tokens)] = torch.tensor(tokens)
    dist.all_reduce(whole)
    return [row[:length] for row, length in zip(whole.tolist(), lengths.tolist(), strict=True)]


def launch(work: Callable[..., None], arguments: tuple[Any, ...], devices: int) -> None:
    """Run `work(*arguments)` in so many processes; one that fails, or is killed, ends all of them with its reason."""
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    multiprocessing.set_forkserver_preload(LIBRARIES)  # imported once, and not by every rank
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        here = dict(os.environ), str(Path.cwd())
        start_processes(_rank, (work, arguments, devices, port, *here), devices, start_method="forkserver")
    except ProcessRaisedException as error:
        if told := re.search(r"^sdd\.errors\.UserError: (.*)", str(error), re.M):
            raise UserError(told[1]) from None
        raise
    except ProcessExitedException as error:
        how = error.signal_name or f"exit code {error.exit_code}"
        raise UserError(
            f"process {error.error_index} of trainer.devices={devices} ended ({how}); if memory was short, ask for "
            "less at once (trainer.micro_batch_tokens); the same command goes on from the last checkpoint"
        ) from None


def _rank(
    number: int,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    devices: int,
    port: int,
    environment: dict[str, str],
    folder: str,
) -> None:
    os.environ |= environment
    os.chdir(folder)
    os.environ |= {"LOCAL_RANK": str(number), "NODE_RANK": "0", "WORLD_SIZE": str(devices)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if number > 0:
        logging.disable(logging.WARNING)  # the first says it
    if torch.cuda.is_available():
        torch.cuda.set_device(number)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // devices))
    work(*arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
