"""Scores of blocks and of MLP channels, and the calibration texts that they are measured on."""

from functools import cached_property
from typing import Any

from sdd.config import plain
from sdd.config.allowed import build
from sdd.errors import UserError
from sdd.importance.channels import SDM, ChannelCriterion, TaylorWidth
from sdd.recipes.data import Data, given, hub_of
from sdd.store import Recipe, canonical

FROM_DATASET = "sdd.data.texts.DatasetTexts"
"""The calibration texts that are made of the fine-tuning rows."""
LOCAL_TEXTS = "sdd.data.texts.LocalTexts"


class Scores(Data):
    """teacher -> scores; a criterion may look at the fine-tuning rows."""

    def scores(self) -> Recipe:
        self._check_metric("metric", channels=False)
        metric = plain(self.config.metric)
        criterion = build(metric)
        labels = {"metric": criterion.name}
        if criterion.needs == "nothing":
            return self._recipe("scores", {"metric": metric, "num_blocks": self.num_blocks}, {}, labels)
        if criterion.needs == "weights":
            return self._recipe("scores", {"metric": metric, "model": self.model_digest}, {}, labels)
        if criterion.needs == "rows":
            return self._recipe("scores", self._rows_scored(metric), {}, labels)
        spec = {"metric": metric, "model": self.model_digest, **self._shown}
        return self._recipe("scores", spec, {}, labels | self._calibration_labels)

    def _rows_scored(self, metric: Any) -> dict[str, Any]:
        """The key of a score on the first of the fine-tuning rows, in chats of at most `calibration.max_length`."""
        return {
            "metric": metric,
            "model": self.model_digest,
            "dtype": self.config.model.dtype,
            "dataset": self._dataset_spec,
            "num_rows": self.num_texts,
            "max_length": self.config.calibration.max_length,
            "system_prompt": self.config.dataset.system_prompt,
            **self._plain_template(self.model_digest),
        }

    @property
    def num_texts(self) -> int:
        """How many texts are looked at: all that there are, unless the criterion wants fewer."""
        asked = int(self.config.calibration.num_texts)
        return min(asked, self.config.metric.get("num_texts") or asked)

    @cached_property
    def _calibration(self) -> Any:
        calibration = self.config.calibration
        node = {"_target_": calibration._target_}
        if calibration._target_ == FROM_DATASET:
            return build(node, num_texts=self.num_texts, dataset=self._dataset, dataset_spec=self._dataset_spec)
        drawn = given(hub=hub_of(calibration.hub), seed=calibration.seed)
        return build(node, path=calibration.path, num_texts=self.num_texts, **drawn)

    @cached_property
    def _calibration_spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self._calibration.spec()
        return spec

    @property
    def _shown(self) -> dict[str, Any]:
        """What a model is shown, and in which dtype, where calibration texts are looked at."""
        length = self.config.calibration.max_length
        return {"dtype": self.config.model.dtype, **self._calibration_spec, "max_length": length}

    @property
    def _calibration_labels(self) -> dict[str, str]:
        """With the file of the texts, all that rerunning needs."""
        calibration = self.config.calibration
        if calibration.path is None or calibration._target_ == LOCAL_TEXTS:
            return {}
        return {"calibration": canonical({"_target_": calibration._target_, **given(seed=calibration.seed)})}

    @property
    def blocks_removed(self) -> int:
        pruning = self.config.pruning
        return int(pruning.size if pruning.blocks is None else len(pruning.blocks))

    @property
    def _width_metric(self) -> str:
        """The node that names the criterion of a width cut."""
        pruning = self.config.pruning
        alone = not pruning.size or pruning.start is not None or pruning.blocks is not None
        return "metric" if alone and not self.config.width_metric else "width_metric"

    def _check_metric(self, node: str, channels: bool) -> None:
        """Refuse a criterion of blocks for a cut of channels, and the reverse."""
        pruning, given = self.config.pruning, self.config[node]
        if not given:
            raise UserError(
                f"pruning.size={pruning.size} and pruning.ratio={pruning.ratio} need a criterion each; add for "
                "example metric=angular metric@width_metric=sdm"
            )
        criterion = build(given)
        if isinstance(criterion, ChannelCriterion) == channels:
            return
        name = f"{'metric@' if node != 'metric' else ''}{node}={criterion.name}"
        if channels:
            raise UserError(
                f"{name} scores blocks, but pruning.ratio={pruning.ratio:g} removes MLP channels; choose one of "
                "sdm, taylor_width, activation_width, magnitude_width, random_width, or prune blocks (pruning=n2)"
            )
        raise UserError(
            f"{name} scores MLP channels, but pruning.size={pruning.size} removes blocks; choose a criterion of blocks "
            "such as metric=angular (for channels beside it metric@width_metric=sdm), or pruning=mlp20"
        )

    def channel_scores(self, depth: Recipe | None) -> Recipe:
        """Scores of MLP channels, of the unpruned model or of the one without blocks."""
        pruning = self.config.pruning
        node = plain(self.config[self._width_metric])
        criterion = build(node)
        labels, inputs = {"metric": criterion.name}, {} if depth is None else {"pruned": depth}
        if criterion.needs == "nothing":
            spec = {"num_blocks": self.num_blocks - self.blocks_removed}
            spec["intermediate_size"] = int(self.sizes["intermediate_size"])
            return self._recipe("scores", {"metric": node, **spec}, {}, labels)
        if isinstance(criterion, SDM | TaylorWidth) and self.config.model.dtype == "float16":
            raise UserError(
                f"metric={criterion.name} takes gradients, which float16 rounds to zero; set model.dtype=bfloat16"
            )
        measured = {}
        if criterion.needs == "texts":
            measured, labels = self._shown, labels | self._calibration_labels
        model = {"model": self.model_digest}
        if not isinstance(criterion, SDM):
            return self._recipe("scores", {"metric": node, **measured} | ({} if depth else model), inputs, labels)
        node |= criterion.resolved(pruning.ratio, pruning.ratio_of)
        first = {"metric": {"_target_": "sdd.channels.TaylorWidth"}, **measured} | ({} if depth else model)
        stage1 = self._recipe("scores", first, inputs, labels | {"metric": TaylorWidth.name})
        return self._recipe("scores", {"metric": node, **measured, **model}, inputs | {"first": stage1}, labels)
