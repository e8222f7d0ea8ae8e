"""Which blocks a model does best without: criteria that remove blocks and measure what is left.

Perplexity (Shortened LLaMA, arXiv 2402.02834): each block alone is left out, and the rise of the model's perplexity on
the texts is taken. Iterative removal does not trust one measurement for many removals: it removes the block that
scores lowest, and measures the smaller model again. It goes by the angular distance between what enters and leaves
each remaining block (Gromov et al. 2024, arXiv 2403.17887), or greedily by what the removal of each one costs in
perplexity or on a task.

Blocks are bypassed in the live model (`sdd.forward.bypass`). A removal leaves all states before it as they were, so
that only the blocks behind it are run again: about half of the block passes that whole runs would take. By angle, one
pass measures all blocks at once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.forward import sums
from sdd.forward.batches import length_batches, padded, show_texts
from sdd.forward.bypass import Bypass, Row, likelihoods
from sdd.importance.criteria import ModelCriterion, OfRows, OfTexts
from sdd.importance.states import Angular, window_sums
from sdd.models import checkpoints

MAX_TOKENS = 4096
"""Padded tokens of a batch, whose states before every block are kept."""


@dataclass
class Quality:
    """What a model reaches on rows, summed up: nats of the scored tokens, and rows whose answer is right."""

    nats: float = 0.0
    tokens: int = 0
    right: int = 0
    rows: int = 0

    @property
    def log_perplexity(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float:
        return self.right / self.rows


def without_each(
    model: Any,
    rows: Sequence[Row],
    removed: Collection[int],
    batch_size: int,
    max_tokens: int = MAX_TOKENS,
    kept_sums: Path | None = None,
) -> tuple[Quality, dict[int, Quality]]:
    """The quality of the model without the blocks `removed`, and of it without each other block besides.

    What is summed up is kept in the file `kept_sums`.
    """
    import torch
    from tqdm import tqdm

    bypass, body = Bypass(model), checkpoints.decoder(model)
    kept = [block for block in range(len(checkpoints.blocks(model))) if block not in removed]
    device = next(model.parameters()).device

    def of(batch: Sequence[int]) -> sums.Sums:
        batch_rows = [rows[index] for index in batch]
        ids, mask = padded([row.ids for row in batch_rows], device)
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        with bypass.letting_through(dict.fromkeys(removed)), bypass.catching(kept) as states:
            hidden = body(**inputs).last_hidden_state
        reached = [likelihoods(model, hidden, batch_rows)]
        progress.update(len(batch))
        for block in kept:
            # All blocks up to this one are passed over, and behind it goes on what entered it.
            outputs = dict.fromkeys([*range(block), *removed]) | {block: states[block]}
            with bypass.letting_through(outputs):
                hidden = body(**inputs).last_hidden_state
            reached.append(likelihoods(model, hidden, batch_rows))
            progress.update(len(batch))
        return {"reached": torch.tensor(reached, dtype=torch.float64)}

    batches = length_batches([len(row.ids) for row in rows], batch_size, max_tokens)
    with (
        torch.no_grad(),
        tqdm(total=len(rows) * (len(kept) + 1), desc=f"removal {len(removed) + 1}", unit="text") as progress,
    ):
        reached = sums.over(batches, of, progress, kept_sums, sorted(removed))["reached"].tolist()
    whole, *each = (Quality(nats, *map(int, counts)) for nats, *counts in reached)
    qualities = dict(zip(kept, each, strict=True))
    for quality in (whole, *qualities.values()):
        if not math.isfinite(quality.nats):
            raise UserError("the model's likelihoods are not finite; choose model.dtype=float32 or bfloat16")
    return whole, qualities


class Perplexity(ModelCriterion, OfTexts):
    """Rise of log-perplexity when a block alone is left out, in nats per token: the log of the factor it rises by."""

    name = "perplexity"
    splits = True

    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks

    def runs(self, num_blocks: int) -> tuple[float, float]:
        return _runs(num_blocks)

    def measure(self, model: Any, rows: Sequence[Row], batch_size: int) -> None:
        whole, qualities = without_each(model, rows, [], batch_size, kept_sums=self.kept("removal"))
        self.log_perplexity = whole.log_perplexity
        self.rises = [qualities[block].log_perplexity - whole.log_perplexity for block in range(self.num_blocks)]

    def scores(self) -> dict[str, Any]:
        order = sorted(range(self.num_blocks), key=lambda block: (self.rises[block], block))
        return {
            "distance": window_sums(self.rises),
            "order": order,
            "unit": "nats per token",
            "unpruned": {"log_perplexity": self.log_perplexity},
        }


class _Iterative(ModelCriterion):
    """Remove the block that scores lowest, measure what is left again, `depth` times (at most all blocks but one).

    `steps` holds each removal with the scores of all blocks that were left then, relative to the model at that step.
    `distance` is of the first step: its scores, and their sums over windows.
    """

    unit: str
    splits = True

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def start(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.steps: list[dict[str, Any]] = []

    def measure(self, model: Any, rows: Sequence[Row], batch_size: int) -> None:
        removed: list[int] = []
        for _ in range(min(self.depth, self.num_blocks - 1)):
            costs = self._step(model, rows, removed, batch_size)
            block = min(costs, key=lambda block: (*costs[block], block))
            removed.append(block)
            step: dict[str, Any] = {"removed": block}
            for index, name in enumerate(("scores", "log_perplexity")[: len(costs[block])]):
                step[name] = [costs[b][index] if b in costs else None for b in range(self.num_blocks)]
            self.steps.append(step)

    @abstractmethod
    def _step(
        self, model: Any, rows: Sequence[Row], removed: list[int], batch_size: int
    ) -> dict[int, tuple[float, ...]]:
        """Of each block that is left: what its removal costs, and what decides between equals."""

    def scores(self) -> dict[str, Any]:
        return {
            "distance": window_sums(self.steps[0]["scores"]),
            "order": [step["removed"] for step in self.steps],
            "steps": self.steps,
            "unit": self.unit,
        }

    def _left(self, num_blocks: int) -> range:
        """How many blocks are left at each step."""
        return range(num_blocks, num_blocks - min(self.depth, num_blocks - 1), -1)


class ByAngle(_Iterative, OfTexts):
    """By the mean angle between the states that enter and leave a block at the last token of the texts."""

    name, unit = "iterative", "angle / pi"

    def runs(self, num_blocks: int) -> tuple[float, float]:
        return float(sum(self._left(num_blocks))), 0.0

    def _step(
        self, model: Any, rows: Sequence[Row], removed: list[int], batch_size: int
    ) -> dict[int, tuple[float, ...]]:
        angular = Angular()
        angular.start(self.num_blocks)
        with Bypass(model).letting_through(dict.fromkeys(removed)):
            kept = self.kept(f"removal-{len(removed)}")
            show_texts(model, angular, [row.ids for row in rows], batch_size, kept=kept, what=removed)
        angles = angular.scores()["distance"]["1"]
        return {block: (angle,) for block, angle in enumerate(angles) if block not in removed}


class _Greedy(_Iterative):
    """By what the removal of each block costs."""

    name = "greedy"

    def runs(self, num_blocks: int) -> tuple[float, float]:
        blocks, heads = zip(*map(_runs, self._left(num_blocks)), strict=True)
        return sum(blocks), sum(heads)

    def _step(
        self, model: Any, rows: Sequence[Row], removed: list[int], batch_size: int
    ) -> dict[int, tuple[float, ...]]:
        kept = self.kept(f"removal-{len(removed)}")
        whole, qualities = without_each(model, rows, removed, batch_size, kept_sums=kept)
        return {block: self._cost(whole, quality) for block, quality in qualities.items()}

    @abstractmethod
    def _cost(self, whole: Quality, without: Quality) -> tuple[float, ...]: ...


class ByPerplexity(_Greedy, OfTexts):
    """By the rise of log-perplexity on the texts when the block goes too, in nats per token."""

    unit = "nats per token"

    def _cost(self, whole: Quality, without: Quality) -> tuple[float, ...]:
        return (without.log_perplexity - whole.log_perplexity,)


class ByTask(_Greedy, OfRows):
    """By the share of fine-tuning rows whose final answer is lost when the block goes too.

    An answer is right if each of its tokens is the likeliest after the task and what the reference says before it;
    among blocks that cost the same, the rise of the whole reference's log-perplexity decides. Rows are scored in place,
    not generated: one pass each.
    """

    unit = "share of answers lost"

    def _cost(self, whole: Quality, without: Quality) -> tuple[float, ...]:
        return whole.accuracy - without.accuracy, without.log_perplexity - whole.log_perplexity


BY: dict[str, type[_Iterative]] = {"angular": ByAngle, "perplexity": ByPerplexity, "task": ByTask}


def iterative(by: str = "angular", depth: int = 10) -> ModelCriterion:
    """The criterion that removes blocks one by one: what it goes by decides what it is shown."""
    if by not in BY:
        raise UserError(f"metric.by={by} is unknown; choose one of {', '.join(BY)}")
    return BY[by](depth)


def _runs(blocks: int) -> tuple[float, float]:
    """How often a text passes through a block and through the head while each of `blocks` blocks is left out."""
    return blocks + blocks * (blocks - 1) / 2, blocks + 1.0
