"""Which artifacts a setting changes, found by changing it: a study's recipes before and after, stage by stage.

What a setting does depends on others (`finetune.ce_share` belongs to one mode), so it is changed in several small
studies, and the answers are put together. Nothing is built, nothing is fetched, no model is opened.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sdd.cli.loader import own_loader
from sdd.config.checks import CHOICES
from sdd.config.settings import setting
from sdd.errors import UserError
from sdd.stages import graph
from sdd.store import STAGES
from sdd.study import Study

SMALL = ["dry_run=true", "dataset.num_rows=30", "finetune.num_rows=20", "finetune.validation_rows=3"]
PUBLIC = ["model=qwen3_0.6b", "metric=last"]
WIDTH = ["metric=taylor_width", "pruning=mlp20"]
SCENES: dict[str, list[list[str]]] = {
    "model": [[], PUBLIC, ["finetune=logit_distill", "metric=last"]],
    "teacher": [["teacher.path=one/model"], ["teacher.path=one/model", "finetune=logit_distill"]],
    "metric": [
        ["metric=random"],
        ["metric=greedy", "metric.depth=4"],
        ["metric=taylor"],
        ["metric=block_influence"],
        ["metric=last_keep_final"],
        ["metric=sdm", "pruning=mlp20"],
    ],
    "width_metric": [["metric@width_metric=random_width", "pruning.ratio=0.2"]],
    "calibration": [
        [],
        ["calibration=c4"],
        ["repair=ridge", "metric=last"],
        ["calibration=local", "calibration.path=TEXTS"],
    ],
    "pruning": [[], ["pruning.start=1"], ["pruning.blocks=[1,2]"], WIDTH],
    "repair": [[], ["repair=ridge"]],
    "dataset": [
        [],
        ["metric=greedy", "metric.by=task"],
        ["engine.temperature=0.7", "engine.tries=2"],
        ["dataset=gsm8k"],
        ["dataset=mixture"],
        ["dataset=local", "dataset.path=ROWS"],
    ],
    "finetune": [
        [],
        ["finetune=logit_distill"],
        ["finetune=logit_distill", "finetune.cached=top_k"],
        *([f"finetune={mode}"] for mode in ("skew_kl", "jsd", "taid", "dac_kl", "redi", "on_policy")),
    ],
    "judge": [["engine.temperature=0.7", "engine.tries=2", "finetune.choice=judge", "judge.model=served"]],
    "rollouts": [["finetune=on_policy"]],
    "adapter": [[], ["adapter=lora_beside_cut"]],
    "engine": [[], ["engine.temperature=0.7", "engine.tries=2"]],
    "merge": [],
    "evaluation": [
        [],
        ["evaluation=lm_eval", "evaluation.tasks=[arc_easy]"],
        ["evaluation.backend=server", "evaluation.model=served"],
    ],
    "analysis": [["analysis=speculative"], ["analysis=shift"], ["analysis=cost"]],
    "trainer": [[], ["adapter.dropout=0.1"]],
    "seed": [[], ["metric=random"]],
}
"""By group: the words of the studies in which its settings count; a group that is not here has the plain study."""
OTHERS: dict[str, list[Any]] = {
    "model.path": ["another/model"],
    "model.revision": ["another"],
    "model.shape": [{}],
    "teacher.path": ["another/model"],
    "dataset.path": ["OTHER"],
    "calibration.path": ["OTHER"],
    "dataset.families": [["word"]],
    "dataset.fields": [{"prompt": "reference"}],
    "dataset.template": ["{prompt} {reference}"],
    "dataset.answer_rule": ["none", "anywhere"],
    "judge.template": ["{prompt} {answers}"],
    "pruning.blocks": [[3, 5]],
    "pruning.after": [["pruning=n1", "finetune=sft"]],
    "pruning.keep": [0.5],
    "pruning.start": [3],
    "finetune.rollout_tokens": [[8, 64]],
    "adapter.targets": [["q_proj"]],
    "adapter.quantisation": ["nf4"],
    "evaluation.tasks": [["arithmetic"], ["piqa"]],
    "evaluation.split": ["test"],
    "finetune.loss": ["reverse_kl", "redi"],
    "finetune.cached": ["top_k", "sampled"],
    "finetune.cached_bits": [8],
    "metric.by": ["angular", "perplexity"],
}
"""Values of settings that cannot be thought of by their type alone."""


MOST_TRIED = 3
"""Options of a group."""


def _differing(before: dict[str, str] | None, after: dict[str, str] | None) -> set[str]:
    """The stages whose addresses differ between two studies; none where one of them is no study."""
    if before is None or after is None:
        return set()
    return {stage for stage in before.keys() | after.keys() if before.get(stage) != after.get(stage)}


class Influence:
    """Studies to change settings in; `folder` is for digests and for two small files of rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loader = own_loader()
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    @cached_property
    def _files(self) -> dict[str, str]:
        """Paths of two files that serve as rows and as texts."""
        for name in ("ROWS", "OTHER"):
            rows = ({"prompt": f"{name} {n}", "reference": f"{n}", "text": f"{name} {n}"} for n in range(40))
            (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {
            "ROWS": str(self.folder / "ROWS"),
            "TEXTS": str(self.folder / "ROWS"),
            "OTHER": str(self.folder / "OTHER"),
        }

    @property
    def defaults(self) -> DictConfig:
        """The config of a command line without a word."""
        return self._config([], small=False)

    def _config(self, words: list[str], small: bool = True) -> DictConfig:
        placed = (*(SMALL if small else ()), *(self._placed(word) for word in words))
        if placed not in self.composed:
            config = self.loader.load_configuration("config", list(placed), RunMode.RUN)
            with open_dict(config):
                del config.hydra
            self.composed[placed] = config
        return self.composed[placed].copy()

    def _placed(self, word: str) -> str:
        key, _, value = word.partition("=")
        return f"{key}={self._files[value]}" if value in ("ROWS", "TEXTS") else word

    def _addresses(self, config: DictConfig) -> dict[str, str] | None:
        """By stage, the address of what a study makes; None where there is no such study."""
        try:
            wanted = graph.wanted(self._study(config), "evaluate")
        except (UserError, OmegaConfBaseException):
            return None
        return {} if wanted is None else {recipe.stage: recipe.address for recipe in wanted.walk()}

    def _study(self, config: DictConfig) -> Study:
        after = config.pruning.after
        before = None if after is None else self._study(self._config([*after]))
        return Study(config, self.folder / "digests", (), before)

    def of_setting(self, key: str) -> list[str]:
        """The stages that another value of a setting changes in some study, in the order of the pipeline."""
        changed: set[str] = set()
        for words in SCENES.get(key.split(".")[0], [[]]):
            config = self._config(words)
            before = self._addresses(config)
            for value in self._others(key, OmegaConf.select(config, key)):
                changed |= _differing(before, self._changed(config, key, value))
        return [stage for stage in STAGES if stage in changed]

    def of_group(self, group: str, options: list[str]) -> list[str]:
        """The stages that the choice among a group's options changes, by a few that go without other settings."""
        changed: set[str] = set()
        before, tried = self._addresses(self._config([])), 0
        for option in options:
            after = self._addresses(self._config([f"{group}={option}"])) if tried < MOST_TRIED else None
            changed |= _differing(before, after)
            tried += after is not None
        return [stage for stage in STAGES if stage in changed]

    def _changed(self, config: DictConfig, key: str, value: Any) -> dict[str, str] | None:
        other = config.copy()
        try:
            OmegaConf.update(other, key, value, force_add=True)
        except OmegaConfBaseException:
            return None
        return self._addresses(other)

    def _others(self, key: str, now: Any) -> Iterator[Any]:
        """Values other than the present one."""
        if key in OTHERS:
            yield from (self._files.get(str(value), value) for value in OTHERS[key])
            return
        if key in CHOICES:
            yield from (choice for choice in CHOICES[key] if choice != now)
            return
        own = setting(key)
        kind = own.type if own is not None else type(now)
        if kind is bool:
            yield not now
        elif kind is int:
            yield 1 if now is None else now + 1
            yield 1 if now is None else max(now - 1, 1)
        elif kind is float:
            yield 0.5 if not now else now / 2
        elif kind is str:
            yield f"{now} again"
        elif kind == list[str]:
            yield ["other"]
        elif kind == list[int]:
            yield [*now[:-1], now[-1] + 1]
