"""Types and ranges of what `config.json` says, before stock code makes anything of it.

Stock code loops over some of these numbers, allocates by others, and looks functions and kernels up by texts. Real
checkpoints are far below the bounds. Knows nothing of which value fits which tensor.
"""

import re
from typing import Any

from sdd.errors import UserError

DEEPEST = 8
MOST_VALUES = 100_000
"""Entries of a config, lists and nested configs included; a long context's scales are a few hundred numbers."""

LONGEST_TEXT = 10_000
LARGEST = 1 << 53
"""Of any number: above it not every whole number is a float."""

SIZE = 1 << 24
"""Of what a tensor is long: a vocabulary of 16 million, say."""

COUNTED = 8192
"""Of what a model has several: heads, experts."""

REQUIRED = {"num_hidden_layers": 1000, "hidden_size": 1 << 18, "vocab_size": SIZE, "num_attention_heads": COUNTED}
"""Whole numbers from 1 to this, where they are given at all."""

OPTIONAL = {"num_key_value_heads": COUNTED, "head_dim": 1 << 16, "max_position_embeddings": 1 << 31}
"""The same, or null."""

COUNTS = re.compile(r"(num|n)_.*|.*_num_.*|.*_(heads|layers|experts|groups)")
LENGTHS = re.compile(r"n_(positions|ctx|embd|inner|embed)|.*(_size|_dim|_rank|_embeddings|_window)")

IMPLEMENTATIONS = (None, "eager", "sdpa", "flash_attention_2")
EXPERTS = (None, "eager", "grouped_mm", "batched_mm")
"""How attention and experts may be computed: by code of the libraries, not by a kernel from a hub."""

DTYPE = re.compile(r"auto|(torch\.)?b?float\d+\w*")


def check_values(config: dict[str, Any], where: str) -> None:
    """Refuse values of a wrong type or out of every range, and any kernel that would be fetched."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{where}: config.json does not open (model_type is no name)")
    for table, may_lack in ((REQUIRED, False), (OPTIONAL, True)):
        for key, most in table.items():
            value = config.get(key)
            absent = key not in config or (may_lack and value is None)
            if not absent and not _is_whole(value, 1, most) and not isinstance(value, str | list):
                raise _refused(where, key, value, f"a whole number from 1 to {most:,}")
    layers = config["num_hidden_layers"]
    if not _is_whole(layers, 1, REQUIRED["num_hidden_layers"]):
        raise _refused(where, "num_hidden_layers", layers, "a whole number from 1 to 1,000")
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and len(kinds) == layers):
        raise UserError(f"{where}: config.json does not open (layer_types is no list of {layers} kinds)")
    _walk(config, where, 0, [MOST_VALUES])


def _refused(where: str, key: str, value: Any, expected: str) -> UserError:
    return UserError(f"{where}: config.json does not open ({key[:60]}={str(value)[:60]} is not {expected})")


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _walk(node: Any, where: str, depth: int, budget: list[int]) -> None:
    """All entries, however deep; `budget` counts down what may still come."""
    if depth > DEEPEST:
        raise UserError(f"{where}: config.json does not open (nested more than {DEEPEST} deep)")
    for key, value in node.items() if isinstance(node, dict) else (("", element) for element in node):
        budget[0] -= 1
        if budget[0] < 0:
            raise UserError(f"{where}: config.json does not open (more than {MOST_VALUES:,} values)")
        if isinstance(node, dict):
            _check_entry(key, value, where)
        if isinstance(value, dict | list):
            _walk(value, where, depth + 1, budget)
        elif isinstance(value, str):
            if len(value) > LONGEST_TEXT:
                raise _refused(where, key, value, f"at most {LONGEST_TEXT:,} characters")
        elif isinstance(value, int | float) and not abs(value) <= LARGEST:  # neither is NaN
            raise _refused(where, key or "a list", "a number", f"finite and at most {LARGEST:,}")


def _check_entry(key: str, value: Any, where: str) -> None:
    if "implementation" in key:
        _check_implementation(key, value, where)
    elif "kernel" in key and isinstance(value, str | dict):
        raise UserError(f"{where}: needs a kernel of its own ({key[:60]} in config.json), which is never run")
    elif key in ("dtype", "torch_dtype") and not (value is None or (isinstance(value, str) and DTYPE.fullmatch(value))):
        raise _refused(where, key, value, "the name of a floating-point dtype")
    elif key == "tokenizer_class" and not (value is None or is_tokenizer(value)):
        raise _refused(where, key, value, "the name of a tokenizer's class")
    elif key == "quantization_config":
        raise UserError(f"{where}: a part of it is quantised (quantization_config in config.json); not supported")
    else:
        is_count = COUNTS.fullmatch(key) is not None and not LENGTHS.fullmatch(key)
        most = COUNTED if is_count else SIZE if LENGTHS.fullmatch(key) else LARGEST
        if key in OPTIONAL:
            most = OPTIONAL[key]
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and (is_count or most == SIZE) and not -1 <= number <= most:
                raise _refused(where, key, "a number", f"from 0 to {most:,}")


def is_tokenizer(name: Any) -> bool:
    """Whether a class's name is that of a tokenizer: stock code would take any of its classes."""
    return isinstance(name, str) and re.fullmatch(r"\w{0,60}(Tokenizer|TokenizerFast|Backend)", name) is not None


def _check_implementation(key: str, value: Any, where: str) -> None:
    if isinstance(value, bool) and key.endswith("_autoset"):  # a note that older releases left
        return
    allowed = EXPERTS if "expert" in key else IMPLEMENTATIONS
    for implementation in value.values() if isinstance(value, dict) else [value]:
        if not (implementation is None or (isinstance(implementation, str) and implementation in allowed)):
            raise UserError(
                f"{where}: needs an attention kernel from a hub (config.json: {key[:60]}={str(implementation)[:60]}), "
                f"which is never run; take it out, or choose from {', '.join(map(str, allowed[1:]))}"
            )
