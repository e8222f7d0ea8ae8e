"""The calibration texts that a config names."""

from functools import cached_property
from typing import Any

from omegaconf import DictConfig

from sdd.config.allowed import build
from sdd.store import canonical
from sdd.study.rows import Rows, part_node

FROM_DATASET = "sdd.data.texts.DatasetTexts"
"""The calibration texts that are made of the fine-tuning rows."""
EMBEDDED_TEXTS = "sdd.data.tiny.TinyTexts"
"""Those of the embedded tasks."""
OF_RECIPES = ("max_length",)
"""Settings of the node that no constructor of texts is told."""
LOCAL_TEXTS = "sdd.data.texts.LocalTexts"


class Calibration:
    """Texts that a model is shown where it is looked at."""

    def __init__(self, config: DictConfig, rows: Rows) -> None:
        self.config, self.rows = config, rows

    @property
    def num_texts(self) -> int:
        """How many texts are looked at: all that there are, unless the criterion wants fewer."""
        asked = int(self.config.calibration.num_texts)
        return min(asked, self.config.metric.get("num_texts") or asked)

    @cached_property
    def source(self) -> Any:
        calibration = self.config.calibration
        node = part_node(calibration, OF_RECIPES)
        if calibration._target_ == FROM_DATASET:
            return build(node, num_texts=self.num_texts, dataset=self.rows.source, dataset_spec=self.rows.spec)
        return build(node, num_texts=self.num_texts)

    @cached_property
    def spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.source.spec()
        return spec

    @property
    def shown(self) -> dict[str, Any]:
        """What a model is shown, and in which dtype: part of a key."""
        return {"dtype": self.config.model.dtype, **self.spec, "max_length": self.config.calibration.max_length}

    @property
    def labels(self) -> dict[str, str]:
        """With the file of the texts, all that rerunning needs."""
        calibration = self.config.calibration
        if calibration.path is None or calibration._target_ == LOCAL_TEXTS:
            return {}
        return {"calibration": canonical(part_node(calibration, (*OF_RECIPES, "path", "hub", "num_texts")))}
