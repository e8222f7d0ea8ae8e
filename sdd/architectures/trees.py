"""Module trees: where blocks are, how logits end, and whether a cut leaves the blocks what they were.

Trees are built without memory for their weights.
"""

from typing import Any

from sdd.architectures.configs import BLOCK_NAME, cut_config, stock_config
from sdd.errors import UserError

PLACE = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes of a module that say where its block stands, and are meant to follow it."""

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
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(opened, attn_implementation="eager", trust_remote_code=False)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: stock code makes no model of config.json ({reason})") from None


def check_cut(config: dict[str, Any], kept: list[int], where: str) -> None:
    """Refuse a cut after which stock code would make another block, or another model around them, of what is kept.

    `config` is explicit; `kept` are the blocks that stay. Seconds at most, whatever the size of the model.
    """
    whole, smaller = skeleton(config, where), skeleton(cut_config(config, kept), where)
    name = type(whole).__name__
    before, after = block_list(whole), block_list(smaller)
    for index, block in enumerate(kept):
        if other := differing(facts(before[block]), facts(after[index])):
            raise UserError(
                f"{where}: {name} would make another block of block {block} at place {index} ({other}), and its "
                "config cannot say otherwise; not pruned"
            )
    if other := differing(_surroundings(whole), _surroundings(smaller)):
        raise UserError(f"{where}: {name} has more that depends on the number of blocks ({other}); not pruned")


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
    named = model.named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named if not BLOCK_NAME.match(name)}


def differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first entry in which two tables differ, in words; empty if none does."""
    for key in [*a, *b]:
        if a.get(key) != b.get(key):
            return f"{key.lstrip('.:')}: {a.get(key)} or {b.get(key)}"
    return ""
