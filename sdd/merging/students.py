"""What a student adds to its base, tensor by tensor: read from a LoRA adapter, or from a full checkpoint.

The task vector of a matrix under LoRA is B A alpha / rank (arXiv 2106.09685), and no full checkpoint is made of it. A
student trained in full adds its checkpoint minus the base. Knows nothing of how students are merged.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sdd.architectures import HEADS, STORED_BUFFERS
from sdd.errors import UserError
from sdd.finetuning.adapters import check_adapter
from sdd.models.checkpoints import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

PLAIN_LORA = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""What an adapter's config says where B A alpha / rank is all that it adds to a matrix."""

WRAPPED = "base_model.model."
"""How names in an adapter begin."""


class Student(Protocol):
    """`name` is for messages; `touches` needs no tensor to be read."""

    name: str

    def touches(self, tensor: str) -> bool: ...

    def read(self, tensor: str, base: Tensor) -> tuple[Tensor, Tensor] | None:
        """The student's tensor and what it added to the base's, float32, the base's shape; None for no change."""
        ...

    def check(self, tensors: set[str]) -> None:
        """Refuse a student of a base with other tensors than these."""
        ...


class AdapterStudent:
    """A PEFT adapter: LoRA matrices, and trained copies of whole tensors."""

    def __init__(self, folder: Path, name: str) -> None:
        from safetensors import safe_open

        self.name = name
        config = check_adapter(folder, name)
        for key, value in PLAIN_LORA.items():
            if config.get(key, value) not in (value, None):
                raise UserError(f"{name}: its adapter has {key}={config[key]}, which cannot be merged; retrain without")
        self.scaling = config["lora_alpha"] / config["r"]
        self.file = safe_open(folder / "adapter_model.safetensors", framework="pt")
        self.factors: dict[str, str] = {}
        self.copies: dict[str, str] = {}
        for key in self.file.keys():  # noqa: SIM118 (no mapping)
            plain = key.removeprefix(WRAPPED)
            if plain.endswith(".lora_A.weight"):
                self.factors[plain.replace(".lora_A.", ".")] = key
            elif "lora_" not in plain:
                self.copies[plain] = key
            elif not plain.endswith(".lora_B.weight"):
                raise UserError(f"{name}: its adapter has {plain}, which cannot be merged; choose adapter=lora")

    def touches(self, tensor: str) -> bool:
        return tensor in self.factors or tensor in self.copies

    def check(self, tensors: set[str]) -> None:
        unknown = sorted((self.factors.keys() | self.copies.keys()) - tensors)
        if any("embed" in name for name in self.copies):  # a tied head is the embeddings once more
            unknown = [name for name in unknown if name not in HEADS or name in self.factors]
        if unknown:
            raise UserError(f"{self.name}: its adapter changes {unknown[0]}, which the base does not have")

    def read(self, tensor: str, base: Tensor) -> tuple[Tensor, Tensor] | None:
        if tensor in self.copies:
            return _with_added(self.file.get_tensor(self.copies[tensor]), base, self.name, tensor)
        if tensor not in self.factors:
            return None
        key = self.factors[tensor]
        down = self.file.get_tensor(key).float()
        up = self.file.get_tensor(key.replace(".lora_A.", ".lora_B.")).float()
        if (up.shape[0], down.shape[1]) != tuple(base.shape):
            raise UserError(f"{self.name}: {tensor} has another shape than the base's; merge students of one base")
        task_vector: Tensor = (up @ down).mul_(self.scaling)
        return base.float() + task_vector, task_vector


class CheckpointStudent:
    """A student trained in full: a checkpoint of its own, in files that need not be cut as the base's are."""

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        from safetensors import safe_open

        self.name = name
        self.place: dict[str, Any] = {}
        for path in checkpoint.weight_files:
            file = safe_open(path, framework="pt")
            self.place |= dict.fromkeys(file.keys(), file)

    def touches(self, tensor: str) -> bool:
        return tensor in self.place

    def check(self, tensors: set[str]) -> None:
        differing = sorted(name for name in tensors ^ self.place.keys() if not STORED_BUFFERS.search(name))
        if differing := [name for name in differing if name in tensors or name not in HEADS]:
            raise UserError(f"{self.name}: {differing[0]} is not in both it and the base; merge students of one base")

    def read(self, tensor: str, base: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.touches(tensor):
            return None
        return _with_added(self.place[tensor].get_tensor(tensor), base, self.name, tensor)


def _with_added(tuned: Tensor, base: Tensor, name: str, tensor: str) -> tuple[Tensor, Tensor] | None:
    if tuned.shape != base.shape:
        raise UserError(f"{name}: {tensor} has another shape than the base's; merge students of one base")
    task_vector = tuned.float() - base.float()
    return (tuned.float(), task_vector) if task_vector.any() else None


def open_students(folders: list[Path]) -> list[Student]:
    """Students from folders that hold `adapter/` or `checkpoint/`, or are a checkpoint themselves."""
    students: list[Student] = []
    for number, folder in enumerate(folders):
        name = f"student {number} ({folder.name})"
        if (folder / "adapter").is_dir():
            students.append(AdapterStudent(folder / "adapter", name))
        else:
            checkpoint = folder / "checkpoint"
            students.append(CheckpointStudent(Checkpoint(checkpoint if checkpoint.is_dir() else folder), name))
    return students
