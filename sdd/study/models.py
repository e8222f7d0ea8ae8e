"""The models that a config names, as checkpoints and digests."""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from sdd.architectures.configs import stated_dtype
from sdd.config import CHOICES
from sdd.errors import NotFetched, UserError
from sdd.models.chats import PLAIN_TEMPLATE
from sdd.models.checkpoints import Checkpoint
from sdd.models.files import CODES, is_narrower
from sdd.models.hub import checkpoint_folder

T = TypeVar("T")

STAND_IN = "not fetched: "
"""How a dry run's digest of what is not on this machine begins."""


class Models:
    """The unpruned model and the teacher. `sources` maps their digests to folders of this machine.

    In a dry run nothing is fetched: what is not here has a stand-in for its digest.
    """

    def __init__(self, config: DictConfig, digest_memory: Path, sources: dict[str, Path]) -> None:
        self.config, self.digest_memory, self.sources = config, digest_memory, sources

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The unpruned model's."""
        return self._checkpoint(self.config.model.path, self.config.model.revision)

    def _checkpoint(self, path: str, revision: str | None) -> Checkpoint:
        return Checkpoint(checkpoint_folder(path, revision, fetch=not self.config.dry_run))

    @cached_property
    def sizes(self) -> dict[str, Any]:
        """The model's `config.json`, or in a dry run before it is fetched, `model.shape`."""

        def look() -> dict[str, Any]:
            return self.checkpoint.config

        shape = {str(key): value for key, value in self.config.model.shape.items()}
        return self.known(look, shape) if shape else look()

    @cached_property
    def num_blocks(self) -> int:
        return int(self.sizes["num_hidden_layers"])

    def known(self, look: Callable[[], T], otherwise: T) -> T:
        """What `look` finds; in a dry run `otherwise`, where it would have to be fetched first."""
        try:
            return look()
        except NotFetched:
            if not self.config.dry_run:
                raise
            return otherwise

    def _digest(self, path: str, revision: str | None) -> str:
        def look() -> str:
            checkpoint = self._checkpoint(path, revision)
            digest = checkpoint.digest(self.digest_memory)
            self.sources[digest] = checkpoint.folder
            return digest

        return self.known(look, f"{STAND_IN}{path}@{revision}")

    @cached_property
    def digest(self) -> str:
        """Of the unpruned model."""
        return self._digest(self.config.model.path, self.config.model.revision)

    @cached_property
    def teacher_digest(self) -> str:
        teacher = self.config.teacher
        if teacher.path is None:
            return self.digest
        try:
            return self._digest(teacher.path, teacher.revision)
        except UserError as error:
            message = str(error).replace("model.path=", "teacher.path=", 1)
            raise UserError(message.replace("model.revision", "teacher.revision")) from None

    def plain_template(self, digest: str) -> str | None:
        """The plain chat template, for the key of what a model without one of its own has to do with."""
        folder = self.sources.get(digest)
        return None if folder is None or Checkpoint(folder).has_chat_template else PLAIN_TEMPLATE

    def steers(self, digest: str) -> bool:
        """Whether the checkpoint ships settings that steer generation, which are not obeyed and once were."""
        folder = self.sources.get(digest)
        return folder is not None and Checkpoint(folder).steers_generation

    @property
    def wider(self) -> str | None:
        """The dtype that the model is opened in, where some of its tensors are stored narrower.

        Its tuned students are base and adapter, added unrounded in that dtype; what is made of one or several of them
        is stored as exactly.
        """
        dtype = self.dtype("model")
        stated = str(stated_dtype(self.sizes))  # before its files are here
        codes = self.known(lambda: self.checkpoint.dtypes, {CODES.get(stated, "")})
        return dtype if any(is_narrower(code, dtype) for code in codes) else None

    def dtype(self, node: str) -> str:
        """The dtype that a node of the config names, or the checkpoint's own."""
        if self.config[node].dtype != "auto":
            return str(self.config[node].dtype)
        dtype = stated_dtype(self.sizes) or "float32"
        if dtype not in CHOICES["model.dtype"]:
            raise UserError(f"{node}.dtype=auto, but the checkpoint is in {dtype}; set {node}.dtype")
        return dtype
