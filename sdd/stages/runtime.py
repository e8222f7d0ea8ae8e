"""What a stage is told besides its recipe: where things are and what they run on. Nothing here changes a result."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.forward.nodes import Nodes
from sdd.models.checkpoints import Checkpoint
from sdd.models.served import Server
from sdd.models.spread import Spread
from sdd.rewriting.engines import Place


@dataclass(frozen=True)
class Runtime:
    """`sources` and `texts` resolve digests to folders, files and calibration texts of this machine; `tasks` are those
    of lm-eval that were built when their rows were checked, each to be taken once; `servers` are those that a group of
    the config asks; `nodes` are the commands of all machines that act together, each with so many devices.

    The defaults are those of `trainer=cpu`.
    """

    sources: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    tasks: dict[str, Any] = field(default_factory=dict)
    accelerator: str = "cpu"
    devices: int = 1
    num_nodes: int = 1
    nodes: Nodes | None = None
    strategy: str = "ddp"
    spread: Spread | None = None
    attention: str = "sdpa"
    micro_batch_tokens: int = 512
    inference_batch_size: int = 32
    evaluation_batch_size: int = 64
    checkpoint_every: int = 50
    gradient_checkpointing: bool = False
    logger: dict[str, Any] = field(default_factory=dict)
    run_folder: Path = Path()
    servers: dict[str, Server] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return "cuda" if self.accelerator == "gpu" else "cpu"

    @property
    def ranks(self) -> int:
        """Processes that share a stage, on all machines."""
        return self.devices * self.num_nodes

    @property
    def is_sharded(self) -> bool:
        """Whether each rank trains its part of the student's tensors."""
        return self.strategy == "fsdp" and self.ranks > 1

    @property
    def placed(self) -> str | Spread:
        """Where a model lies that is passed without gradients: on one device, or spread over all."""
        return self.spread or self.device

    @property
    def place(self) -> Place:
        """Where an engine answers."""
        return Place(self.placed, self.inference_batch_size, self.attention, self.servers.get("engine"))

    @staticmethod
    def servers_of(config: Any) -> dict[str, Server]:
        """The servers that a composed config's groups ask, by group."""
        groups = ("engine", "evaluation", "judge", "rollouts")
        asking = {group: config[group] for group in groups if config[group].get("base_url")}
        return {
            group: Server(
                str(node["base_url"]), **{key: node[key] for key in ("concurrency", "retries", "timeout")}, group=group
            )
            for group, node in asking.items()
        }

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

    def checkpoint(self, digest: str, what: str = "model") -> Checkpoint:
        return Checkpoint(self.source(digest, what))
