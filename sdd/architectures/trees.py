"""Module trees: where blocks are, how logits end, and whether a cut leaves the blocks what they were.

Trees are built without memory for their weights.
"""

import itertools
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sdd.architectures.configs import BLOCK_NAME, HEADS, STORED_BUFFERS, cut_config, stock_config
from sdd.errors import UserError

PLACE = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes of a module that say where its block stands, and are meant to follow it."""

MOST_MODULES = 300_000
"""Modules of a model: 61 blocks of 256 experts have 63 thousand."""

MULTIPLIED = {"logit_scale": ("cohere", "cohere2"), "logits_scaling": ("hyperclovax",)}
DIVIDED = {"logits_scaling": ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "granite_swa")}
"""Config values by which the head's output is scaled, and the model types that do."""


def scaled(logits: Any, config: Any) -> Any:
    """What a causal LM makes of its head's output: scale, then soft cap; any shape."""
    for key, types in MULTIPLIED.items():
        if config.model_type in types:
            logits = logits * getattr(config, key)
    for key, types in DIVIDED.items():
        if config.model_type in types:
            logits = logits / getattr(config, key)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


def block_list(model: Any) -> Any:
    """The list of transformer blocks of a causal LM, in order."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise UserError(f"{type(model).__name__}: its blocks are not found under `layers`; not supported")
    return layers


def skeleton(config: dict[str, Any], where: str) -> Any:
    """The model of a config without memory for its weights: classes, names, shapes and settings."""
    import torch
    from transformers import AutoModelForCausalLM

    opened = stock_config(config, where)
    try:
        with torch.device("meta"), _within(MOST_MODULES):
            return AutoModelForCausalLM.from_config(opened, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: stock code makes no model of config.json ({reason})") from None


@contextmanager
def _within(most: int) -> Iterator[None]:
    """Stop the building of a model that has more parts than any real one, such as a million experts."""
    from torch.nn.modules.module import register_module_module_registration_hook

    builder, count = threading.get_ident(), itertools.count()

    def counted(module: Any, name: str, child: Any) -> None:
        if threading.get_ident() == builder and next(count) > most:
            raise ValueError(f"it would have more than {most:,} parts")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def check_shapes(model: Any, stored: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse stored tensors that stock code would not take as the model's own: others, or of other shapes.

    `model` is a skeleton. Stock code draws at random what is not stored, and leaves what it does not know. Where it
    rebuilds tensors as it reads them (experts are stacked), their numbers are compared block by block.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    def plain(name: str) -> str:
        return HEADS[0] if name in HEADS else name.removeprefix(f"{model.base_model_prefix}.")

    expected = {plain(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored_shapes = {plain(name): shape for name, shape in stored.items() if not STORED_BUFFERS.search(name)}
    tied = {plain(name) for name in getattr(model, "all_tied_weights_keys", None) or {}}
    advice = "the two are not of one model, fetch it again"
    for name, shape in expected.items():
        if name in stored_shapes and stored_shapes[name] != shape:
            mismatch = f"{name} is stored as {list(stored_shapes[name])}, config.json makes it {list(shape)}"
            raise UserError(f"{where}: {mismatch}; {advice}")
    missing = {name: shape for name, shape in expected.items() if name not in stored_shapes and name not in tied}
    if missing and get_checkpoint_conversion_mapping(model.config.model_type) is not None:
        unexpected = {name: shape for name, shape in stored_shapes.items() if name not in expected and name not in tied}
        if _numbers_by_block(missing) == _numbers_by_block(unexpected):
            return
    if missing:
        raise UserError(f"{where}: {next(iter(missing))} is not stored as config.json makes it; {advice}")


def _numbers_by_block(shapes: Mapping[str, tuple[int, ...]]) -> Counter[str]:
    numbers: Counter[str] = Counter()
    for name, shape in shapes.items():
        match = BLOCK_NAME.match(name)
        numbers[match["index"] if match else ""] += math.prod(shape)
    return numbers


def check_cut(
    config: dict[str, Any], kept: list[int], where: str, stored: Mapping[str, tuple[int, ...]] | None = None
) -> None:
    """Refuse a cut after which stock code would make another block, or another model around them, of what is kept.

    `config` is explicit; `kept` are the blocks that stay; `stored` the shapes of the tensors, if they are to be those
    of the config. Seconds at most, whatever the size of the model.
    """
    whole = skeleton(config, where)
    if stored is not None:
        check_shapes(whole, stored, where)
    smaller = skeleton(cut_config(config, kept), where)
    name = type(whole).__name__
    before, after = block_list(whole), block_list(smaller)
    for index, block in enumerate(kept):
        if difference := differing(facts(before[block]), facts(after[index])):
            raise UserError(
                f"{where}: {name} would make another block of block {block} at place {index} ({difference}), and its "
                "config cannot say otherwise; not pruned"
            )
    if difference := differing(_surroundings(whole), _surroundings(smaller)):
        raise UserError(f"{where}: {name} has more that depends on the number of blocks ({difference}); not pruned")


def facts(block: Any) -> dict[str, Any]:
    """All that is known of a block without its weights: classes, plain settings, shapes."""
    facts: dict[str, Any] = {}
    for name, module in block.named_modules():
        facts[f"{name}:class"] = type(module).__name__
        for key, value in vars(module).items():
            if key not in PLACE and not key.startswith("_") and _is_plain(value):
                facts[f"{name}.{key}"] = value
    return facts | {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _surroundings(model: Any) -> dict[str, Any]:
    parameters = model.named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in parameters if not BLOCK_NAME.match(name)}


def differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first entry in which two tables differ, in words; empty if none does."""
    for key in [*a, *b]:
        if a.get(key) != b.get(key):
            return f"{key.lstrip('.:')}: {a.get(key)} or {b.get(key)}"
    return ""
