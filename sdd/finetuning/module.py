"""The student in training: a LightningModule around what `adapters` made, and the plan of its batches.

One step is one global batch. It is cut into micro-batches of similar length whose losses are *sums* over target tokens,
divided by the number of target tokens of the whole global batch: neither padding nor the cut changes any sequence's
loss. Logits are computed at target positions only. Order and randomness are functions of (seed, step), and the step is
all that resuming needs. Knows nothing of the store, Hydra, or where the rows come from.
"""

import math
import random
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

from sdd.errors import UserError
from sdd.finetuning.adapters import causal_lm
from sdd.finetuning.modes import VALIDATIONS
from sdd.finetuning.prefix import FrozenStates, frozen_states
from sdd.finetuning.sharded import Shards, part_of, whole
from sdd.forward import chunks, ranks
from sdd.forward.batches import padded
from sdd.forward.losses import summed_in_chunks, target_loss_sum
from sdd.forward.memory import Halving, freed, is_short
from sdd.models.checkpoints import check_logits, decoder, head_logits

if TYPE_CHECKING:
    from sdd.finetuning.rollouts import Rollouts

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingRow:
    """Token ids of prompt and target; loss is taken on ids[prompt_length:], and counts `weight` times. `rejected` are
    those of the same prompt and of an answer that was refused; `place` is the row's among those whose teacher's
    probabilities are kept."""

    ids: list[int]
    prompt_length: int
    rejected: list[int] | None = None
    weight: float = 1.0
    place: int | None = None

    @property
    def longest(self) -> int:
        return max(len(self.ids), len(self.rejected or ()))


@dataclass(frozen=True)
class Optimisation:
    """Settings of the optimiser; `warmup_share` of the steps rise linearly, the rest follow a cosine to zero."""

    learning_rate: float
    weight_decay: float
    warmup_share: float
    clip_norm: float
    seed: int
    steps: int
    steps_per_epoch: int


def step_rows(num_rows: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """The rows of every step: each epoch a permutation of all rows, a function of (seed, epoch); none is dropped."""
    steps, numbers = [], list(range(num_rows))
    for epoch in range(epochs):
        order = numbers.copy()  # of the same objects: a million rows are 8 MB an epoch
        random.Random(f"order {seed} {epoch}").shuffle(order)
        steps += [order[at : at + batch_size] for at in range(0, num_rows, batch_size)]
    return steps


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Places of rows of these lengths, sorted by length and cut so that rows x longest <= `max_tokens` (a single longer
    row stands alone)."""
    batches: list[list[int]] = []  # shortest first, unlike `length_batches`: another order is rounded otherwise
    for at in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[at] <= max_tokens:
            batches[-1].append(at)
        else:
            batches.append([at])
    return batches


def labelled(rows: Sequence[TrainingRow], device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, attention mask and labels (-100 off the target), each (B, T); pads are never targets."""
    ids, mask = padded([row.ids for row in rows], device)
    starts = torch.tensor([row.prompt_length for row in rows], device=device)
    targets = mask.bool() & (torch.arange(ids.shape[1], device=device) >= starts[:, None])
    return ids, mask, ids.where(targets, -100)


def loss_sum(model: Any, rows: Sequence[TrainingRow], device: Any = "cpu") -> tuple[Tensor, int]:
    """Summed cross-entropy over the rows' target tokens, and their number; logits at target positions only."""
    ids, mask, labels = labelled(rows, device)
    at = labels[:, 1:] != -100
    states, targets = target_states(model, ids, mask, at), labels[:, 1:][at]
    tensors = [states, targets]
    if any(row.weight != 1 for row in rows):
        tensors.append(torch.tensor([row.weight for row in rows], device=device)[:, None].expand(at.shape)[at])

    def loss(hidden: Tensor, *targets: Tensor) -> Tensor:
        return target_loss_sum(head_logits(model, hidden), *targets)

    if not chunks.is_cut(len(states), model.config.vocab_size):
        return loss(*tensors), len(targets)
    return summed_in_chunks(loss, *tensors, chunk=chunks.CHUNK_TOKENS), len(targets)


def target_states(model: Any, ids: Tensor, mask: Tensor, at: Tensor) -> Tensor:
    """The states from which the tokens chosen by `at`, (B, T - 1), are predicted: -> (N, hidden)."""
    hidden: Tensor = decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[:, :-1][at]


def target_tokens(rows: Sequence[TrainingRow]) -> int:
    return sum(len(row.ids) - row.prompt_length for row in rows)


@runtime_checkable
class Remembering(Protocol):
    """A loss that goes by what it was in earlier steps, and counts otherwise than by target tokens."""

    def count(self, rows: Sequence[TrainingRow]) -> int:
        """What the sum over a global batch is divided by."""

    def stepped(self, loss: float, done: float) -> None:
        """Told of a step's mean loss, and of the share of all steps that are behind."""

    def state(self) -> dict[str, float]: ...

    def restore(self, state: dict[str, float]) -> None: ...


class Staying(Strategy):
    """A strategy that leaves the student where it is: Lightning's own would take it and the optimiser's moments to the
    CPU in the end, which in full fine-tuning is 12 bytes a parameter of the host's memory."""

    def teardown(self) -> None:
        self.precision_plugin.teardown()
        assert self.accelerator is not None
        self.accelerator.teardown()
        self.checkpoint_io.teardown()


class OneDevice(Staying, SingleDeviceStrategy):
    """Lightning's strategy for one device, which is the student's."""


class SummedGradients(Staying, DDPStrategy):
    """Lightning's DDP around a module that sums its own gradients, once a step and not at every micro-batch."""

    def configure_ddp(self) -> None:
        """The module stays bare: the wrapper would average after every backward pass."""


def staying(student: Any, ranks: int) -> Strategy:
    """Of a student that each rank has a whole copy of."""
    return SummedGradients() if ranks > 1 else OneDevice(next(student.parameters()).device)


class StudentModule(pl.LightningModule):
    """Trains what requires a gradient in `student` on `rows` in the order of `plan`; validates on `validation`.

    `loss` is `loss_sum` or another function of the same signature. `run` says whose checkpoints these are: those of
    another run are not gone on from. In the folder `scratch`, states below the lowest trained block are kept for later
    epochs. `rollouts` put the student's own answers in place of targets, in training and in validation; beside that
    loss, which a student can lower by what its teacher mistakes, the history then has `golden_loss`: cross-entropy on
    the held-out targets. With `keep_best`, what was trained is kept as it was at the lowest validation loss, the first
    of equals. A step that memory does not last for is begun again in smaller passes, unless it is to be `halves=False`,
    where draws of dropout follow the passes; the gradients are those of the same global batch, added in another order.
    With `shards`, which hold the student, parameters are split over the ranks before the first step, and no pass is
    begun again: all ranks go through the same ones.
    """

    def __init__(
        self,
        student: Any,
        rows: Sequence[TrainingRow],
        plan: Sequence[Sequence[int]],
        validation: Sequence[TrainingRow],
        optimisation: Optimisation,
        micro_batch_tokens: int,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
        loss: Callable[..., tuple[Tensor, int]] = loss_sum,
        run: str = "",
        scratch: Path | None = None,
        rollouts: "Rollouts | None" = None,
        keep_best: bool = False,
        halves: bool = True,
        shards: Shards | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False
        self.student = student
        self.rows, self.plan, self.validation = rows, plan, validation
        self.optimisation, self.micro_batch_tokens = optimisation, micro_batch_tokens
        self.halves, self.fitting = halves, micro_batch_tokens
        self.history: list[dict[str, Any]] = []
        self.on_step, self.loss, self.run = on_step, loss, run
        self.scratch, self.rollouts = scratch, rollouts
        self.rates: dict[str, float] = {}
        self.frozen: FrozenStates | None = None
        self.began = False
        self.keep_best = keep_best
        self.best: dict[str, Any] | None = None
        self._shards = (shards,)  # in a tuple: no part of this module, whose student it holds

    @property
    def causal_lm(self) -> Any:
        """The student as a causal LM, its adapter in place."""
        return causal_lm(self.student)

    def count(self, rows: Sequence[TrainingRow]) -> int:
        """What the loss of a global batch is divided by: its target tokens, unless the loss says otherwise."""
        return self.loss.count(rows) if isinstance(self.loss, Remembering) else target_tokens(rows)

    def loss_state(self) -> dict[str, float]:
        """What the loss goes by of earlier steps."""
        return self.loss.state() if isinstance(self.loss, Remembering) else {}

    def train_dataloader(self) -> Any:
        """A bare counter: the rows of a step follow from the step itself."""
        return torch.utils.data.DataLoader(range(len(self.plan)), batch_size=None)  # type: ignore[arg-type]

    @property
    def shards(self) -> Shards | None:
        return self._shards[0]

    def configure_model(self) -> None:
        if self.shards is not None and not hasattr(self.shards, "reshard"):
            self.shards.split(self.device_mesh["data_parallel"])  # type: ignore[index]
            with torch.no_grad():
                for model in map(causal_lm, self.shards.models):
                    self._within(partial(check_logits, model))

    def _within(self, work: Callable[[], T]) -> T:
        """What `work()` comes to, where the student's parameters are whole."""
        return work() if self.shards is None else self.shards.within(work)

    def on_fit_start(self) -> None:
        """Dropout and recomputed activations follow the mode, and a loaded model is in evaluation mode."""
        self.student.train()

    def on_train_start(self) -> None:
        """All that a checkpoint holds has been taken over, and Lightning's count of steps is its history's."""
        if self.global_step != len(self.history):
            raise ValueError(f"step {self.global_step}, and {len(self.history)} in the history")
        self.began = True
        again = self.rollouts is None and sum(map(len, self.plan)) > len(self.rows)
        if self.scratch is not None and self.trainer.world_size == 1 and again:
            lengths = array("i", (len(row.ids) for row in chain(self.rows, self.validation)))
            where = self.scratch, self.micro_batch_tokens, self.device
            with self.trainer.precision_plugin.train_step_context():
                self.frozen = frozen_states(self.causal_lm, lengths, self._ids_of, *where)

    def _ids_of(self, number: int) -> list[int]:
        """Of a row to train on, or behind all of these, of a held-out one."""
        trained = len(self.rows)
        return (self.rows[number] if number < trained else self.validation[number - trained]).ids

    def training_step(self, batch: Any, batch_idx: int) -> None:
        step = self.global_step
        torch.manual_seed(_seed_of(self.optimisation.seed, step) + self.trainer.global_rank)
        rows, started = self._step_rows(step), time.perf_counter()
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        tokens = self.count(rows)
        while (total := self._summed_gradients(rows, self.plan[step], max(tokens, 1))) is None:
            for parameter in self.trained().values():
                parameter.grad = None
        if self.trainer.world_size > 1:
            if self.shards is None:
                ranks.sum_gradients(self.trained().values())
            (total,) = ranks.summed([total], self.device)
        self.clip_gradients(optimizer, self.optimisation.clip_norm, "norm")  # type: ignore[arg-type]
        rate = optimizer.param_groups[0]["lr"]  # type: ignore[union-attr]
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr, call-arg]
        if self.rollouts is not None:
            seconds = time.perf_counter() - started
            self.rates = {"rollout_rate": self.rollouts.rate, "training_rate": target_tokens(rows) / seconds}
        loss = total / max(tokens, 1)
        if isinstance(self.loss, Remembering):
            self.loss.stepped(loss, (step + 1) / len(self.plan))
        self._record(step + 1, loss, rate)

    def _summed_gradients(self, rows: Sequence[TrainingRow], numbers: Sequence[int], count: int) -> float | None:
        """The summed loss of this rank's passes, their gradients of it / `count` added up; None where memory did not
        last, and smaller passes are to be tried."""
        total, micro = 0.0, list[int]()
        try:
            for micro, counts in self._own_passes(rows):
                summed, _ = self._loss_of([rows[at] for at in micro], [numbers[at] for at in micro], self.loss)
                self.manual_backward((summed if counts else summed * 0.0) / count)
                total += float(summed.detach()) if counts else 0.0
            return total
        except (RuntimeError, MemoryError) as error:
            if len(micro) == 1 or not self.halves or not is_short(error):
                raise
        self._halve(rows, micro)
        return None

    def _own_passes(self, rows: Sequence[TrainingRow]) -> list[tuple[list[int], bool]]:
        """The places of the rows of each of this rank's passes, and whether it counts: its micro-batches, cut again
        where they did not fit.

        Each rank cuts its own alone, so that all know whose are whose; with shards all cut alike, and those that have
        a pass less than others go through one that does not count.
        """
        lengths = [row.longest for row in rows]
        micros = micro_batches(lengths, self.micro_batch_tokens if self.shards is None else self.fitting)
        own = list(ranks.own(micros))
        missing = 0 if self.shards is None else -(-len(micros) // ranks.number()) - len(own)
        if self.fitting < self.micro_batch_tokens:
            own = [
                [micro[at] for at in part]
                for micro in own
                for part in micro_batches([lengths[at] for at in micro], self.fitting)
            ]
        return [(micro, True) for micro in own] + [(micros[0], False)] * missing

    def _halve(self, rows: Sequence[TrainingRow], micro: Sequence[int]) -> None:
        """From now on passes are half as large as this one."""
        tokens = len(micro) * max(rows[at].longest for at in micro)
        self.fitting = tokens // 2
        freed("padded tokens", tokens, self.fitting)

    def _step_rows(self, step: int) -> list[TrainingRow]:
        if self.rollouts is not None:
            return self.rollouts.step_rows(self.causal_lm, step)
        return [self.rows[index] for index in self.plan[step]]

    def _loss_of(
        self, rows: Sequence[TrainingRow], numbers: Sequence[int], loss: Callable[..., tuple[Tensor, int]]
    ) -> tuple[Tensor, int]:
        """The loss of rows, which have these numbers among those whose states may be kept."""
        with self.frozen.standing_in(numbers, self.device) if self.frozen else nullcontext():
            return self._within(lambda: loss(self.causal_lm, rows, self.device))

    def _record(self, step: int, loss: float, rate: float) -> None:
        epoch = round(step / self.optimisation.steps_per_epoch, 4)
        row: dict[str, Any] = {"step": step, "epoch": epoch, "loss": loss, "learning_rate": rate}
        every = max(1, len(self.plan) // VALIDATIONS)
        validate = bool(self.validation) and (step % every == 0 or step == len(self.plan))
        row["validation_loss"] = self.validation_loss() if validate else None
        if self.rollouts is not None:
            row["golden_loss"] = self._mean_loss(self.validation, loss_sum) if validate else None
            row |= self.rollouts.facts(step - 1)
        if self.keep_best and validate:
            self._keep(step, row["validation_loss"])
        self.history.append(row)
        logged = self.rates | {key: float(value) for key, value in row.items() if value is not None and key != "step"}
        if self.trainer.loggers:  # each call took 2 to 5% of a small step
            self.log_dict(logged)
        if self.on_step:
            self.on_step(step, logged)

    def _keep(self, step: int, loss: float) -> None:
        if loss < (self.best["loss"] if self.best else float("inf")):
            state = {name: whole(parameter.detach()).cpu().clone() for name, parameter in self.trained().items()}
            self.best = {"step": step, "loss": loss, "state": state}

    @torch.no_grad()
    def take_best(self) -> int | None:
        """Make the student what it was at its best; the step, or None where it stays the last."""
        if self.best is None:
            return None
        for name, parameter in self.trained().items():
            parameter.copy_(part_of(self.best["state"][name], parameter))
        return int(self.best["step"])

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss per target token of the held-out rows, in nats; the loss is the one that is trained."""
        rows = self.validation
        if self.rollouts is not None:
            rows = self.rollouts.held_out(self.causal_lm, rows)
        return self._mean_loss(rows, self.loss)

    @torch.no_grad()
    def _mean_loss(self, rows: Sequence[TrainingRow], loss_of: Callable[..., tuple[Tensor, int]]) -> float:
        self.student.eval()
        total, tokens = 0.0, 0.0
        trained, halving = len(self.rows), Halving("held-out rows", lambda some: len(some) * rows[some[-1]].longest)

        def passed(micro: Sequence[int]) -> tuple[float, int]:
            loss, count = self._loss_of([rows[at] for at in micro], [trained + at for at in micro], loss_of)
            return float(loss), count

        for micro, counts in self._own_passes(rows):
            for _, (loss, count) in [(micro, passed(micro))] if self.shards else halving(passed, micro):
                if counts:
                    total, tokens = total + loss, tokens + count
        if self.trainer.world_size > 1:
            total, tokens = ranks.summed([total, tokens], self.device)
        self.student.train()
        return total / max(tokens, 1)

    def configure_optimizers(self) -> Any:
        settings = self.optimisation
        trained = list(self.trained().values())
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        warmup = max(1, round(settings.warmup_share * settings.steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = (step - warmup) / max(1, settings.steps - warmup)
            return float(0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, progress)))))

        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"},
        }

    def trained(self) -> dict[str, Any]:
        """What training changes, by name, in the optimiser's order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes, not the base; and the history, so that a resumed one reads the same."""
        trained = self.trained()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint.pop("callbacks", None)  # paths of files that go as new ones come
        checkpoint |= {"history": self.history, "run": self.run, "best": self.best}
        if self.fitting < self.micro_batch_tokens:  # a resumed run adds in the same order
            checkpoint["fitting"] = self.fitting
        if state := self.loss_state():
            checkpoint["loss"] = state
        if self.rollouts is not None:
            checkpoint["rollouts"] = self.rollouts.state(checkpoint["global_step"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.pop("callbacks", None)
        self.history = list(checkpoint["history"])
        self.best = checkpoint.get("best") if self.keep_best else None
        self.fitting = min(self.micro_batch_tokens, checkpoint.get("fitting", self.micro_batch_tokens))
        if state := checkpoint.get("loss"):
            self.loss.restore(state)  # type: ignore[attr-defined]
        if self.rollouts is not None:
            self.rollouts.load(checkpoint["rollouts"], checkpoint["global_step"])


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are there whole or not at all: a kill or a full disk leaves no half one to resume from.

    The one that is gone on from has been read already, by `read_checkpoint`; no other file is opened, whatever
    Lightning comes upon.
    """

    def __init__(self, resumed: dict[str, Any] | None = None) -> None:
        self.resumed = resumed

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        half = Path(f"{path}.half")
        super().save_checkpoint(checkpoint, half, storage_options)
        half.replace(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        resumed, self.resumed = self.resumed, None
        assert resumed is not None, f"{path} is no checkpoint of this run"
        return resumed


def read_checkpoint(path: Path, module: StudentModule) -> dict[str, Any] | None:
    """The checkpoint in a file if it is one of the module's own run, else None; nothing in it is run.

    Tensors, numbers, texts and containers of these are all that is read (`weights_only`), and a pickle of anything else
    is refused; a damaged file and the checkpoint of another run are no checkpoint.
    """
    if path.is_symlink() or not path.is_file():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        shapes = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
        moments = {index: state["exp_avg"].shape for index, state in checkpoint["optimizer_states"][0]["state"].items()}
        steps = [row["step"] for row in checkpoint["history"]]
        run, step = checkpoint["run"], checkpoint["global_step"]
        remembered = {name: math.isfinite(value) for name, value in checkpoint.get("loss", {}).items()}
        fits = module.rollouts is None or module.rollouts.fits(
            checkpoint["rollouts"], step, module.causal_lm.config.vocab_size
        )
        fits = fits and int(checkpoint.get("fitting", 1)) >= 1
        best = checkpoint.get("best")
        kept = best and {name: tensor.shape for name, tensor in best["state"].items()}
    except UnpicklingError:
        raise UserError(f"{path} is no checkpoint of plain tensors and is not opened; remove it") from None
    except (OSError, MemoryError):  # of the machine, not of the file, which is kept
        raise
    except Exception as error:  # whatever a stranger's bytes make of the reader
        if "can't allocate memory" in str(error):
            raise
        return None
    expected = {name: parameter.shape for name, parameter in module.trained().items()}
    in_plan = steps == list(range(1, step + 1)) and step <= len(module.plan)
    in_plan = in_plan and remembered == dict.fromkeys(module.loss_state(), True)
    in_plan = in_plan and kept in (None, expected)
    own_run = (run, shapes) == (module.run, expected) and moments.items() <= dict(enumerate(expected.values())).items()
    return checkpoint if in_plan and own_run and fits else None


def _seed_of(seed: int, step: int) -> int:
    return random.Random(f"step {seed} {step}").getrandbits(63)
