"""The sizes of a model and the rates of a machine: what a pass, a generated token or a cache takes of one on the other.

What estimates are made of. Matrix products are counted (2 FLOPs a weight and token, attention on top), divided by a
rate that a device sustains, and a fixed cost is added for every pass through a block, which is what small models and
single tokens really pay. Knows nothing of stages; loads no library.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdd.errors import UserError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """What a machine sustains: FLOP/s in 32 and 16 bits, bytes/s of memory and of disk, seconds a block and pass."""

    name: str
    flops: dict[int, float]
    bandwidth: float
    disk: float
    block_seconds: float
    start_seconds: float


DEVICES = {
    "cpu": Device("two CPU cores", {4: 4e10, 2: 4e10}, 1e10, 3e8, 4e-4, 2.0),
    "gpu": Device("one H100-class GPU", {4: 3e13, 2: 2.5e14}, 2e12, 1e9, 8e-4, 15.0),
}
"""By `trainer.accelerator`. The rates are those of plain transformers code, far below what the hardware could do."""


NORMS_BEHIND, NORMS_OF_QUERIES = ("gemma2", "gemma3_text"), ("gemma3_text", "olmo2", "qwen3", "qwen3_moe")
"""Kinds of models with a norm behind attention and MLP too, and with norms of queries and keys."""
CAPPED = ("gemma2",)
"""Kinds whose attention has a soft cap, so that no kernel spares its matrix of scores."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder; `experts` MLPs in a block, of which a token uses `active`.

    `norms` of a block's states, and whether queries and keys have norms too. `capped`: see `CAPPED`.
    """

    hidden: int
    intermediate: int
    blocks: int
    heads: int
    groups: int
    head_dim: int
    vocabulary: int
    tied: bool
    mlp_matrices: int = 3
    experts: int = 1
    active: int = 1
    norms: int = 2
    norms_of_queries: bool = False
    capped: bool = False

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of a dense block's linear layers, under their usual names."""
        inner, shared = self.heads * self.head_dim, self.groups * self.head_dim
        attention = {
            "q_proj": (self.hidden, inner),
            "k_proj": (self.hidden, shared),
            "v_proj": (self.hidden, shared),
            "o_proj": (inner, self.hidden),
        }
        mlp = {"up_proj": (self.hidden, self.intermediate), "down_proj": (self.intermediate, self.hidden)}
        if self.mlp_matrices == 3:
            mlp["gate_proj"] = (self.hidden, self.intermediate)
        return attention | mlp

    def block_parameters(self, experts: int) -> int:
        """Weights of one block with that many MLPs, its two norms included; biases and further norms are left out."""
        attention = sum(a * b for name, (a, b) in self.linear.items() if name[0] in "qkvo")
        mlp = self.mlp_matrices * self.hidden * self.intermediate * experts
        router = self.hidden * self.experts if self.experts > 1 else 0
        return attention + mlp + router + 2 * self.hidden

    def parameters(self, blocks: int | None = None) -> int:
        """Weights of the model, or of what is left of it with `blocks` blocks; tied weights once."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        kept = self.blocks if blocks is None else blocks
        return embeddings + kept * self.block_parameters(self.experts) + self.hidden

    def forward_flops(self, blocks: int, context: float) -> float:
        """FLOPs of one token that sees `context` tokens on average, the head not included."""
        return blocks * (2 * self.block_parameters(self.active) + 4 * context * self.heads * self.head_dim)

    @property
    def head_flops(self) -> float:
        return 2.0 * self.hidden * self.vocabulary

    def cache_bytes(self, blocks: int, width: int) -> int:
        """Bytes of keys and values a token, at `width` bytes a number."""
        return 2 * blocks * self.groups * self.head_dim * width


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The sizes in a `config.json`, or in a model option's `shape`, under the names that stock configs use."""
    try:
        hidden, blocks, heads = (
            int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
        )
        experts = config.get("num_local_experts") or config.get("num_experts") or 1
        width = config.get("moe_intermediate_size") if experts > 1 else None
        kind = config.get("model_type")
        return Shape(
            hidden=hidden,
            intermediate=int(width or config["intermediate_size"]),
            blocks=blocks,
            heads=heads,
            groups=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            mlp_matrices=2 if kind == "gpt_neox" else 3,
            experts=int(experts),
            active=int(config.get("num_experts_per_tok") or 1),
            norms=4 if kind in NORMS_BEHIND else 2,
            norms_of_queries=kind in NORMS_OF_QUERIES,
            capped=kind in CAPPED,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the model's sizes (config.json or model.shape) lack what an estimate needs: {error}"
        ) from None


@dataclass(frozen=True)
class CostModel:
    """A model with `blocks` blocks at `width` bytes a number on a device: what every stage's estimate starts from."""

    shape: Shape
    blocks: int
    width: int
    device: Device

    @property
    def weights(self) -> float:
        return float(self.shape.parameters(self.blocks) * self.width)

    @property
    def opening(self) -> float:
        """Seconds until the model is in memory."""
        return self.device.start_seconds + self.weights / self.device.disk

    def passes(self, tokens: float, context: float, passes: float, cost: float = 1.0, head: bool = True) -> float:
        """Seconds of `tokens` tokens in `passes` batches; a training step costs `cost` forward passes."""
        flops = tokens * (self.shape.forward_flops(self.blocks, context / 2) + (self.shape.head_flops if head else 0))
        return cost * (flops / self.device.flops[self.width] + passes * self.blocks * self.device.block_seconds)

    def activations(self, tokens: float, length: float) -> float:
        """Bytes that a forward pass without gradients holds for rows of `length` tokens, `tokens` in all.

        One block at a time, and of it the MLP, or the scores of an attention that is capped: in 16 bits twice, and in
        32 bits as they are and as probabilities.
        """
        mlp = 3 * self.width * self.shape.intermediate
        scores = (2 * self.width + 8) * self.shape.heads * length if self.shape.capped else 0
        return tokens * (6 * self.width * self.shape.hidden + max(mlp, scores))

    def kept_by_backward(self, length: float, trained: bool = True) -> float:
        """Bytes a token that backward keeps of a block, in rows of `length`: the norms' states in float32, and what
        enters every layer; `trained` layers each have a copy of it, as autocast makes one.

        Keys and values count as all heads, as kernels with a mask want them. A capped attention's scores stay in 16
        bits twice and in 32 bits once. Held to a trace (benchmarks/shapes.py) in 16 bits.
        """
        shape = self.shape
        inner, shared = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        entering = (5 * shape.hidden + 5 * inner if trained else shape.hidden + 4 * inner) + 4 * shape.intermediate
        normed = 4 * (shape.norms * shape.hidden + (inner + shared if shape.norms_of_queries else 0))
        scores = (2 * self.width + 4) * shape.heads * length if shape.capped else 0
        return float(self.width * entering + normed + scores)

    def logits(self, tokens: float) -> float:
        """Bytes of the logits and of their softmax."""
        return tokens * self.shape.vocabulary * 2 * self.width

    def generation(self, rows: float, prompt: float, new: float, batch: float) -> tuple[float, float]:
        """(seconds, bytes beside the weights) of answering `rows` prompts in batches, a token at a time."""
        batches = -(-rows // min(batch, rows))
        return self.answering(rows, prompt, new, batch, batches, batches * new)

    def answering(
        self, rows: float, prompt: float, new: float, batch: float, reads: float, steps: float
    ) -> tuple[float, float]:
        """(seconds, bytes beside the weights) of `reads` passes over all prompts and `steps` over next tokens."""
        batch = min(batch, rows)
        cache = batch * (prompt + new) * self.shape.cache_bytes(self.blocks, self.width)
        flops = batch * (self.shape.forward_flops(self.blocks, prompt + new / 2) + self.shape.head_flops)
        step = max(
            flops / self.device.flops[self.width],
            (self.weights + cache) / self.device.bandwidth,
            self.blocks * self.device.block_seconds,
        )
        seconds = self.passes(rows * prompt, prompt, reads, head=False) + steps * step
        return seconds, cache + self.activations(batch * prompt, prompt) + self.logits(batch)
