"""What a stage is told besides its recipe: where things are and what they run on. Nothing here changes a result."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.store import write_atomically
from sdd.untrusted import ANY, check_shape, read_json, read_rows


@dataclass(frozen=True)
class Runtime:
    """`sources` and `texts` resolve digests to folders, files and calibration texts of this machine.

    The defaults are those of `trainer=cpu`, so that a rebuilt artifact is rounded as the first one was.
    """

    sources: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    accelerator: str = "cpu"
    devices: int = 1
    attention: str = "eager"
    micro_batch_tokens: int = 512
    inference_batch_size: int = 32
    evaluation_batch_size: int = 64
    checkpoint_every: int = 50
    gradient_checkpointing: bool = False
    logger: dict[str, Any] = field(default_factory=dict)
    run_folder: Path = Path()

    @property
    def device(self) -> str:
        return "cuda" if self.accelerator == "gpu" else "cpu"

    @staticmethod
    def sizes(config: Any) -> dict[str, Any]:
        """What a composed config says of how much goes into one pass: sums of other sizes are rounded otherwise."""
        trainer = config["trainer"]
        return {
            "micro_batch_tokens": trainer["micro_batch_tokens"],
            "inference_batch_size": config["engine"].get("batch_size") or trainer["inference_batch_size"],
            "evaluation_batch_size": config["evaluation"]["batch_size"],
        }

    def source(self, digest: str, what: str) -> Path:
        if digest not in self.sources:
            raise UserError(f"the {what} with digest {digest} is not at hand; name it with --source {digest}=PATH")
        return self.sources[digest]


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Atomically, one object a line."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of an artifact, which may be a stranger's."""
    yield from read_rows(path, f"{path}")


def read_facts(path: Path, shape: Any = ANY) -> dict[str, Any]:
    """A JSON object of an artifact, in a shape (see `sdd.untrusted.check_shape`)."""
    facts = read_json(path, f"{path}")
    check_shape(facts, shape, f"{path}")
    return facts


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
