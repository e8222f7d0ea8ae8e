"""What every recipe stands on: the model and the teacher as digests, and the versions of the stages."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from sdd.config import CHOICES
from sdd.errors import NotFetched, UserError
from sdd.models import checkpoints
from sdd.models.chats import PLAIN_TEMPLATE
from sdd.models.hub import checkpoint_folder
from sdd.pruning.depth import count_parameters
from sdd.store import Recipe, canonical

T = TypeVar("T")

VERSIONS = {"scores": 1, "pruned": 1, "rewrites": 1, "targets": 1, "tuned": 1, "merged": 1, "evaluated": 1}
VERSIONS |= {"answered": 1, "surprisals": 1, "drafted": 1, "shifted": 1, "measured": 1}
"""Raised when the way a stage computes changes its content."""

ANSWERING = ("rewrites", "answered", "evaluated", "drafted")
"""Stages in which a model writes freely."""

STAND_IN = "not fetched: "
"""How a dry run's digest of what is not on this machine begins."""


def is_provisional(recipe: Recipe) -> bool:
    """Whether the recipe's address is another one once all it names has been fetched."""
    return any(STAND_IN in canonical(upstream.spec) for upstream in recipe.walk())


class Models:
    """The models that a config names.

    `sources` maps the digests that recipes name to paths on this machine, `texts` to calibration texts. In a dry run
    nothing is fetched: what is not here has a stand-in for its digest.
    """

    def __init__(self, config: DictConfig, digest_memory: Path) -> None:
        self.config = config
        self.digest_memory = digest_memory
        self.sources: dict[str, Path] = {}
        self.texts: dict[str, list[str]] = {}

    @cached_property
    def model_folder(self) -> Path:
        model = self.config.model
        return checkpoint_folder(model.path, model.revision, fetch=not self.config.dry_run)

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The model's `config.json`, or in a dry run before it is fetched, `model.shape`."""

        def look() -> dict[str, Any]:
            return checkpoints.read_config(self.model_folder)

        shape = {str(key): value for key, value in self.config.model.shape.items()}
        return self._known(look, shape) if shape else look()

    @cached_property
    def num_blocks(self) -> int:
        return int(self.sizes["num_hidden_layers"])

    def _known(self, look: Callable[[], T], otherwise: T) -> T:
        """What `look` finds; in a dry run `otherwise`, where it would have to be fetched first."""
        try:
            return look()
        except NotFetched:
            if not self.config.dry_run:
                raise
            return otherwise

    def _digest(self, path: str, revision: str | None) -> str:
        def look() -> str:
            folder = checkpoint_folder(path, revision, fetch=not self.config.dry_run)
            count_parameters(folder)  # reads the header of every file, so that a file cut short is told now
            digest = checkpoints.model_digest(folder, self.digest_memory)
            self.sources[digest] = folder
            return digest

        return self._known(look, f"{STAND_IN}{path}@{revision}")

    @cached_property
    def model_digest(self) -> str:
        return self._digest(self.config.model.path, self.config.model.revision)

    @cached_property
    def teacher_digest(self) -> str:
        teacher = self.config.teacher
        if teacher.path is None:
            return self.model_digest
        try:
            return self._digest(teacher.path, teacher.revision)
        except UserError as error:
            message = str(error).replace("model.path=", "teacher.path=", 1)
            raise UserError(message.replace("model.revision", "teacher.revision")) from None

    def _plain_template(self, digest: str) -> dict[str, str]:
        """The plain chat template, for the key of what a model without one of its own has to do with."""
        folder = self.sources.get(digest)
        return {} if folder is None or checkpoints.has_chat_template(folder) else {"chat_template": PLAIN_TEMPLATE}

    def _dtype(self, node: str) -> str:
        """The dtype that a node of the config names, or the checkpoint's own."""
        if self.config[node].dtype != "auto":
            return str(self.config[node].dtype)
        dtype = str(self.sizes.get("dtype") or self.sizes.get("torch_dtype") or "float32")
        if dtype not in CHOICES["model.dtype"]:
            raise UserError(f"{node}.dtype=auto, but the checkpoint is in {dtype}; set {node}.dtype")
        return dtype

    def _recipe(self, stage: str, spec: dict[str, Any], inputs: dict[str, Recipe], labels: dict[str, str]) -> Recipe:
        return Recipe(stage, VERSIONS[stage] + self._raised(stage, spec, inputs), spec, inputs, dict(labels))

    def _raised(self, stage: str, spec: dict[str, Any], inputs: dict[str, Recipe]) -> int:
        """What the version of a stage is raised by where a model writes otherwise than it once did.

        By 1 where the checkpoint ships settings that steer generation, which were once obeyed; by 2 where rewrites are
        sampled, whose noise was once drawn from another generator; by 4 where a student with an adapter runs in 16
        bits, whose rotary frequencies were once rounded too.
        """
        if stage not in ANSWERING:
            return 0
        digest = self.teacher_digest if stage == "rewrites" else self.model_digest
        folder = self.sources.get(digest)
        steered = folder is not None and checkpoints.steers_generation(folder)
        sampled = stage == "rewrites" and self.config.engine.get("temperature", 0) > 0
        student = inputs.get("model")
        adapted = student is not None and student.stage == "tuned" and student.spec["adapter"].get("method") != "full"
        rounded = adapted and spec["dtype"] != "float32"
        return steered + 2 * sampled + 4 * rounded
