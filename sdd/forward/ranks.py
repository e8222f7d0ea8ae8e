"""Several processes at one piece of work, a device each: what is told apart by rank, and told to all.

All of them go through the same work. Of passes that do not depend on each other each rank takes its `own` and hears of
the others', so that all end with what one process has. In training the ranks' gradients are summed: since losses are
sums over target tokens, divided by those of the whole global batch, that is the gradient of one process; it rounds
otherwise. They are of one machine, or of several whose commands act together (`nodes.py`), numbered node by node. Knows
nothing of what is computed.
"""

import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sdd.errors import UserError
from sdd.forward.nodes import Nodes, Place, free_port

if TYPE_CHECKING:
    from torch import Tensor

LIBRARIES = ["sdd.finetuning.module", "transformers", "peft"]
GRACE = 2.0
"""Seconds that a rank waits with a reason that may follow from another's, and others have to end by themselves."""
LOOK_ROUND = 0.5
"""Seconds between two looks at what the other nodes say."""
BUCKET = 1 << 24
"""Numbers that are summed together."""

T = TypeVar("T")


# ---- in a rank, or alone ----------------------------------------------------------------------------------------


_one_of = (0, 1)
"""This process's number, and how many there are; what the environment says may be of whoever started the command."""


def is_rank() -> bool:
    """Whether this process is one of several at the same work."""
    return number() > 1


def rank() -> int:
    return _one_of[0]


def number() -> int:
    """How many there are."""
    return _one_of[1]


def own(items: Sequence[T]) -> Sequence[T]:
    """This rank's share: every so-manieth."""
    return items[rank() :: number()]


def told(own: bytes) -> list[bytes]:
    """What every rank says, by rank; all have to call it."""
    if not is_rank():
        return [own]
    import torch
    import torch.distributed as dist

    group = _group()
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(number())]
    dist.all_gather(sizes, torch.tensor([len(own)]), group)
    longest = max(1, *map(int, sizes))
    texts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(texts, torch.frombuffer(bytearray(own.ljust(longest, b"\0")), dtype=torch.uint8), group)
    return [bytes(text[: int(size)].numpy()) for text, size in zip(texts, sizes, strict=True)]


@cache
def _group() -> Any:
    """The group in which ranks talk: on CPUs, whatever their gradients meet on."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank(), world_size=number())
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def merged(own: Mapping[int, T]) -> dict[int, T]:
    """Values of JSON by number, from all ranks. What a float was it still is: JSON writes all of its digits."""
    if not is_rank():
        return dict(own)
    pairs = [pair for text in told(json.dumps(list(own.items())).encode()) for pair in json.loads(text)]
    return dict(pairs)


# ---- gradients --------------------------------------------------------------------------------------------------


def sum_gradients(parameters: "Iterable[Tensor]") -> None:
    """Over all ranks, in place; one that a rank has no gradient of counts as zero there."""
    import torch

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


def _sum(gradients: "Sequence[Tensor]") -> None:
    import torch

    whole = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(whole)
    for gradient, summed in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def summed(values: Sequence[float], device: Any) -> list[float]:
    """Each value's sum over all ranks."""
    import torch

    whole = torch.tensor(values, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(whole)
    return [float(value) for value in whole]


# ---- the process that starts them -------------------------------------------------------------------------------


def launch(work: Callable[..., None], arguments: tuple[Any, ...], devices: int, nodes: Nodes | None = None) -> None:
    """Run `work(*arguments)` in so many processes, beside those of other nodes; one that fails, or is killed, ends all
    of them with its reason. None outlives this call, however it ends."""
    import torch
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    multiprocessing.set_forkserver_preload(LIBRARIES)  # imported once, and not by every rank
    where = replace(nodes.place, port=nodes.port) if nodes else Place("127.0.0.1", free_port(), 0, 1, devices)
    threads = max(1, torch.get_num_threads() // devices)
    told = work, arguments, where, threads, dict(os.environ), str(Path.cwd())
    begun = start_processes(_rank, told, devices, join=False, start_method="forkserver")
    try:
        while not begun.join(LOOK_ROUND if nodes else None, GRACE):
            if nodes:
                nodes.look()
    except ProcessRaisedException as error:
        if said := re.search(r"^sdd\.errors\.UserError: (.*)", str(error), re.M):
            raise UserError(said[1]) from None
        if nodes:
            nodes.look(GRACE)
        raise RuntimeError(re.findall(r"^[\w.]+(?:: .*)?$", str(error), re.M)[-1]) from error
    except ProcessExitedException as error:
        how = error.signal_name or f"exit code {error.exit_code}"
        on = f" on node {where.node}" if nodes else ""
        raise UserError(
            f"process {error.error_index} of trainer.devices={devices}{on} ended ({how}); if memory was short, ask for "
            "less at once (trainer.micro_batch_tokens, trainer.inference_batch_size); the same command goes on from "
            "what it left"
        ) from None
    finally:
        left = [process for process in begun.processes if process.is_alive()]
        for process in left:  # a command that is told to end would wait for them
            process.kill()
        for process in left:
            process.join(GRACE)
        if left:
            print(file=sys.stderr)  # a bar that one of them showed has no end of its line


def end_with_launcher() -> None:
    """In a rank, end as soon as the process that began it is gone, or at once by SIGTERM.

    One that waits for another heeds no signal, and Lightning's way to heed it tells the other ranks in the midst of
    their gradients, so that all would wait for each other.
    """
    launcher = multiprocessing.parent_process()
    assert launcher is not None, "ranks are begun by multiprocessing"

    def watch() -> None:
        launcher.join()
        os._exit(1)

    def obey() -> None:
        signal.sigwait({signal.SIGTERM})
        os._exit(128 + signal.SIGTERM)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in this thread, and in those that it begins
    for end in (watch, obey):
        threading.Thread(target=end, name="end-with-launcher", daemon=True).start()


def _rank(
    device: int,
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    where: Place,
    threads: int,
    environment: dict[str, str],
    folder: str,
) -> None:
    import torch

    global _one_of

    end_with_launcher()
    os.environ |= environment
    os.chdir(folder)
    _one_of = where.node * where.devices + device, where.nodes * where.devices
    os.environ |= {"LOCAL_RANK": str(device), "NODE_RANK": str(where.node), "WORLD_SIZE": str(number())}
    os.environ |= {"MASTER_ADDR": where.address, "MASTER_PORT": str(where.port)}
    for name in [name for name in os.environ if name == "RANK" or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]  # of the command, where torchrun started it
    if rank() > 0:
        logging.disable(logging.WARNING)  # the first says it, and shows how far it is
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(threads)
    try:
        work(*arguments)
    except UserError:
        raise
    except Exception:  # it may be that another one is gone, whose reason is to be told and comes first
        time.sleep(GRACE)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
