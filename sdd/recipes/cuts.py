"""The pruned model: blocks go before channels, and a repair refits what is left at the cut."""

from pathlib import Path

from omegaconf import DictConfig

from sdd.config import check_pruning
from sdd.errors import UserError
from sdd.pruning.depth import check_names
from sdd.pruning.repair import check_repairable, cuts_of
from sdd.pruning.width import Share, sizes_of
from sdd.recipes.scores import Scores
from sdd.store import Recipe


class Cuts(Scores):
    """scores -> pruned."""

    def __init__(self, config: DictConfig, digest_memory: Path) -> None:
        super().__init__(config, digest_memory)
        check_pruning(config.pruning, self.num_blocks)

    def pruned(self) -> Recipe | None:
        """None where nothing is pruned: the student then starts from the unpruned model."""
        cut, repair = self._cut(), self.config.repair
        if repair.method == "none":
            return cut
        if self.config.pruning.ratio is not None:
            raise UserError(
                f"repair={repair.method} is for removed blocks only, not for narrower ones; choose repair=none"
            )
        removed = None if cut is None else cut.spec.get("blocks")
        if cut is None or not (removed or cut.spec.get("size")):
            raise UserError(
                f"repair={repair.method} refits what is before removed blocks, and none is removed; add for example "
                "pruning=n2, or choose repair=none"
            )
        if removed:
            cuts_of([block for block in range(self.num_blocks) if block not in removed], removed)
        self._known(lambda: bool(check_repairable(self.model_folder)), True)
        spec = {
            "model": self.model_digest,
            "repair": repair.method,
            "penalty": repair.penalty,
            **self._shown,
        }
        return self._recipe("pruned", spec, {"pruned": cut}, cut.labels | self._calibration_labels)

    def _cut(self) -> Recipe | None:
        """The pruned model as it comes from the cut, before any repair. Blocks go before channels."""
        pruning = self.config.pruning
        if pruning.ratio is None:
            if self.config.width_metric and (pruning.size or pruning.blocks is not None):
                raise UserError("metric@width_metric scores channels; add pruning.ratio=0.2, or leave it out")
            return self._without_blocks()
        self._check_metric(self._width_metric, channels=True)
        gone = self.blocks_removed
        share = Share(pruning.ratio, pruning.ratio_of, pruning.multiple)
        self._known(lambda: sizes_of(self.model_folder).width(share, gone), None)
        depth = self._without_blocks()
        scores = self.channel_scores(depth)
        spec = {
            "model": self.model_digest,
            "ratio": pruning.ratio,
            "ratio_of": pruning.ratio_of,
            "multiple": pruning.multiple,
        }
        inputs = {"scores": scores} if depth is None else {"scores": scores, "pruned": depth}
        both = "+".join(recipe.labels["metric"] for recipe in (depth, scores) if recipe and "metric" in recipe.labels)
        return self._recipe("pruned", spec, inputs, {"metric": both})

    def _without_blocks(self) -> Recipe | None:
        """The model without the blocks that go; None where none does."""
        pruning = self.config.pruning
        if pruning.size or pruning.blocks is not None:
            self._known(lambda: check_names(self.model_folder), None)
        blocks = None if pruning.blocks is None else sorted(pruning.blocks)
        if pruning.start is not None:
            blocks = list(range(pruning.start, pruning.start + pruning.size))
        if blocks is not None:
            return self._recipe("pruned", {"model": self.model_digest, "blocks": blocks}, {}, {})
        if pruning.size == 0:
            return None
        depth = self.config.metric.get("depth") or pruning.size
        if pruning.size > depth:
            raise UserError(
                f"pruning.size={pruning.size}, but metric.depth={depth} removals are measured; raise metric.depth"
            )
        scores = self.scores()
        spec = {"model": self.model_digest, "size": pruning.size, "rule": "lowest"}
        return self._recipe("pruned", spec, {"scores": scores}, scores.labels)
