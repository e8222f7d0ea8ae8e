"""What a model costs to run: parameters, FLOPs a token, bytes; and what running it takes on this machine.

The paper counts removed parameters over all parameters as FLOPs saved. Really, a token costs 2 FLOPs a weight of every
linear layer, 4 * context * heads * head size in every block for attention (queries with keys, weights with values), and
2 * hidden * vocabulary for the head; looking up embeddings costs none, and norms, activations and softmax are left out,
as is usual. Counted from the modules themselves, so that a cut of any shape counts as it is.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sdd.architectures import skeleton
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint
from sdd.planning.cost_model import BYTES


def parameters(model: Any) -> int:
    """Weights, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def linear_flops(model: Any) -> float:
    """FLOPs a token of all blocks' matrices: 2 a weight; of experts (3 axes), those that a token uses."""
    config = model.config
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    used = (getattr(config, "num_experts_per_tok", None) or 1) / experts
    weights = [weight for block in checkpoints.blocks(model) for weight in block.parameters()]
    return float(sum(2 * weight.numel() * {2: 1.0, 3: used}.get(weight.dim(), 0.0) for weight in weights))


def _contexts(model: Any, context: float) -> list[float]:
    """Tokens that each block's attention sees of `context` tokens: at most its window, where it has one."""
    config, blocks = model.config, len(checkpoints.blocks(model))
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not window:
        return [context] * blocks
    kinds = kinds or ["sliding_attention"] * blocks
    return [min(context, window) if kind == "sliding_attention" else context for kind in kinds]


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def attention_flops(model: Any, context: float) -> float:
    """FLOPs of one token's attention in all blocks, over `context` tokens, itself among them."""
    config = model.config
    return float(4 * sum(_contexts(model, context)) * config.num_attention_heads * _head_size(config))


def head_flops(model: Any) -> float:
    return float(2 * model.get_output_embeddings().weight.numel())


def cache_numbers(model: Any, context: int) -> float:
    """Numbers in the keys and values of `context` tokens."""
    config = model.config
    groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return float(2 * sum(_contexts(model, context)) * groups * _head_size(config))


def counted(checkpoint: Checkpoint, context: int, dtype: str) -> dict[str, Any]:
    """The costs of one checkpoint: `flops` of a generated token at `context`, and of a token of a prompt that long.

    The prompt's token sees half the context on average, and no head: only its last token's logits are made.
    """
    model = skeleton(checkpoint.config, checkpoint.where)
    width, count, linear = BYTES[dtype], parameters(model), linear_flops(model)
    generated = {"linear": linear, "attention": attention_flops(model, context), "head": head_flops(model)}
    prompt = {"linear": linear, "attention": attention_flops(model, (context + 1) / 2), "head": 0.0}
    return {
        "parameters": count,
        "blocks": len(checkpoints.blocks(model)),
        "flops_per_generated_token": generated | {"total": sum(generated.values())},
        "flops_per_prompt_token": prompt | {"total": sum(prompt.values())},
        "cache_bytes_per_token": int(cache_numbers(model, 1) * width),
        "cache_bytes_at_context": int(cache_numbers(model, context) * width),
        "weight_bytes": count * width,
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.weight_files),
    }


def saved(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Shares that a cut saves, in [0, 1]: `flops_as_in_the_paper` is removed parameters over all parameters."""
    shares = {
        key: 1 - after[key]["total"] / before[key]["total"]
        for key in ("flops_per_generated_token", "flops_per_prompt_token")
    }
    for key in ("parameters", "cache_bytes_at_context", "weight_bytes"):
        shares[key] = 1 - after[key] / before[key]
    return {"flops_as_in_the_paper": shares["parameters"], **shares}


# ---- measured ---------------------------------------------------------------------------------------------------


def machine(device: str, dtype: str) -> dict[str, Any]:
    """What timings were taken on."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "torch": torch.__version__,
    }


def _processor() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, least and greatest of repeated measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "repeats": len(values)}


def timed(function: Callable[[], Any], device: str) -> float:
    """Seconds that a call takes, the device's queue included."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class Stepper:
    """A model with a cache of `context` tokens in `batch` rows, for timing single passes."""

    def __init__(self, model: Any, context: int, batch: int) -> None:
        import torch

        generator = torch.Generator().manual_seed(0)
        words = min(model.config.vocab_size, 1000)
        self.model = model
        self.ids = torch.randint(0, words, (batch, context), generator=generator).to(model.device)
        self.cache: Any = None

    def prefill(self) -> None:
        """The whole context in one pass, and the logits of its last token."""
        import torch

        with torch.no_grad():
            self.cache = self.model(input_ids=self.ids, use_cache=True, logits_to_keep=1).past_key_values

    def step(self, tokens: int = 1) -> None:
        """A pass over `tokens` more tokens, with the logits of each."""
        import torch

        with torch.no_grad():
            self.model(input_ids=self.ids[:, :tokens], past_key_values=self.cache, use_cache=True)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()


def step_seconds(
    opened: dict[str, Any], shown: dict[str, tuple[str, int]], context: int, repeats: int, device: str
) -> dict[str, float]:
    """Median seconds of passes behind `context` tokens, taking turns; `shown` maps a name to (model, tokens)."""
    steppers = {name: (Stepper(opened[model], context, 1), tokens) for name, (model, tokens) in shown.items()}
    seconds: dict[str, list[float]] = {name: [] for name in shown}
    for stepper, tokens in steppers.values():
        stepper.prefill()
        stepper.step(tokens)
    for _ in range(repeats):
        for name, (stepper, tokens) in steppers.items():
            seconds[name].append(timed(partial(stepper.step, tokens), device))
    return {name: statistics.median(values) for name, values in seconds.items()}


def measured(
    opened: dict[str, Any], prompt_tokens: int, new_tokens: int, batch: int, repeats: int, device: str
) -> dict[str, Any]:
    """Latency (batch 1), throughput and peak memory of several models side by side, the models taking turns.

    Seconds, tokens a second, bytes. Peak memory is that of the weights and of what a prompt pass over the batch adds.
    """
    steppers = {name: (Stepper(m, prompt_tokens, 1), Stepper(m, prompt_tokens, batch)) for name, m in opened.items()}
    timings: dict[str, dict[str, list[float]]] = {name: {} for name in opened}
    added: dict[str, int] = {}

    def decode(stepper: Stepper) -> float:
        return timed(partial(stepper.steps, new_tokens), device)

    for repeat in range(repeats + 1):  # the first round warms up
        for name, (single, batched) in steppers.items():
            values = {"prefill_seconds": timed(single.prefill, device)}
            values["decode_seconds_per_token"] = decode(single) / new_tokens
            added[name] = _peak(batched.prefill, device)
            values["tokens_per_second"] = batch * new_tokens / decode(batched)
            single.cache = batched.cache = None
            for key, value in values.items() if repeat else ():
                timings[name].setdefault(key, []).append(value)
    records: dict[str, Any] = {}
    for name, model in opened.items():
        weights = sum(int(weight.numel()) * weight.element_size() for weight in model.parameters())
        records[name] = {key: spread(times) for key, times in timings[name].items()}
        records[name]["peak_bytes"] = weights + added[name]
    return records


def _peak(function: Callable[[], Any], device: str) -> int:
    """Bytes of tensors that a call holds at its peak beyond those that were there before it."""
    import torch

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return int(torch.cuda.max_memory_allocated() - before)
    return _peak_of_tensors(function)


def _peak_of_tensors(function: Callable[[], Any]) -> int:
    """The same where the allocator keeps no count: every new storage, from its making until it is freed.

    What a kernel takes for itself while it runs is not seen.
    """
    import weakref

    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known: set[int] = set()
            self.held = self.peak = 0

        def free(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.held -= size

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            output = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    if id(storage) not in self.known | given:
                        self.known.add(id(storage))
                        self.held += storage.nbytes()
                        weakref.finalize(storage, self.free, id(storage), storage.nbytes())
            self.peak = max(self.peak, self.held)
            return output

    with Count() as count:
        function()
    return int(count.peak)
