"""The rows, what the teacher makes of them, and the targets that are chosen from both."""

from functools import cached_property, partial
from typing import Any

from omegaconf import DictConfig

from sdd.config import plain
from sdd.config.allowed import build
from sdd.data import Example
from sdd.errors import UserError
from sdd.recipes.models import Models
from sdd.store import Recipe


def hub_of(node: DictConfig) -> dict[str, Any] | None:
    """A config's `hub` node as plain values; None where it names no repository."""
    return plain(node) if node.repository else None


def given(**values: Any) -> dict[str, Any]:
    """The values that are set: a part whose constructor does not know a setting refuses it only if it was given."""
    return {key: value for key, value in values.items() if value is not None}


class Data(Models):
    """dataset -> rewrites -> targets."""

    @cached_property
    def _dataset(self) -> Any:
        return self._source(self.config.dataset)

    def _source(self, dataset: DictConfig) -> Any:
        if not dataset.parts:
            return self._rows(dataset, dataset.seed, dataset.num_rows)
        return build(
            {"_target_": dataset._target_},
            parts={name: partial(self._rows, part, dataset.seed) for name, part in dataset.parts.items()},
            weights={name: part.weight for name, part in dataset.parts.items()},
            num_rows=dataset.num_rows,
        )

    def _rows(self, rows: DictConfig, seed: int, num_rows: int | None) -> Any:
        """A source of rows as the config describes it."""
        return build(
            {"_target_": rows._target_},
            path=rows.path,
            num_rows=num_rows,
            seed=seed,
            families=None if rows.families is None else list(rows.families),
            **given(hub=hub_of(rows.hub), fields=None if rows.fields is None else dict(rows.fields)),
        )

    @cached_property
    def _dataset_spec(self) -> dict[str, Any]:
        spec = {"_target_": self.config.dataset._target_, **self._dataset.spec()}
        self.sources |= self._dataset.sources()
        return spec

    @property
    def rows(self) -> list[Example] | None:
        """The dataset's rows; None where they would have to be asked of the hub."""
        parts = list(self.config.dataset.parts.values()) or [self.config.dataset]
        if any(part.path is None and part.hub.repository is not None for part in parts):
            return None
        found: list[Example] = self._dataset.examples()
        return found

    @property
    def _labels(self) -> dict[str, str]:
        return {"dataset": self.config.dataset.name}

    def rewrites(self) -> Recipe:
        dataset = self.config.dataset
        engine = build(self.config.engine)
        spec = {
            "teacher": self.teacher_digest,
            "dtype": self.config.model.dtype,
            "dataset": self._dataset_spec,
            "template": self._of_rows("template"),
            "system_prompt": dataset.system_prompt,
            "engine": engine.spec(),
            **self._plain_template(self.teacher_digest),
        }
        if engine.tries > 1:
            spec["selection"] = self._selection()
        return self._recipe("rewrites", spec, {}, self._labels)

    def _of_rows(self, key: str) -> Any:
        """A setting of the dataset; in a mixture, of each part by name."""
        dataset = plain(self.config.dataset)
        return {name: part[key] for name, part in dataset["parts"].items()} if dataset["parts"] else dataset[key]

    def _selection(self) -> dict[str, Any]:
        return {"rule": self._of_rows("answer_rule"), "leak_phrases": self._of_rows("leak_phrases")}

    def targets(self) -> Recipe:
        finetune = self.config.finetune
        if finetune.mode == "none":
            raise UserError("finetune=none has no targets; choose finetune=sft or finetune=self_distill")
        if finetune.mode == "gold" and not self._dataset.has_gold:
            raise UserError("finetune=gold needs answers in the teacher's own register; this dataset has none")
        if finetune.mode in ("sft", "gold", "logit_distill"):
            spec = {"mode": finetune.mode, "dataset": self._dataset_spec}
            return self._recipe("targets", spec, {}, self._labels)
        spec = {
            "mode": finetune.mode,
            **self._selection(),
            "select": finetune.select,
            "gold_share": finetune.gold_share,
            **({"noise_share": finetune.noise_share} if finetune.noise_share else {}),
        }
        return self._recipe("targets", spec, {"rewrites": self.rewrites()}, self._labels)
