"""What `config.json` says of blocks, and what it leaves to stock code: lists per block are made explicit, then cut."""

import re
from collections.abc import Mapping
from typing import Any

from sdd.architectures.values import check_values
from sdd.errors import UserError

BLOCK_NAME = re.compile(r"^(?P<before>(?:.+?\.)?layers\.)(?P<index>0|[1-9][0-9]{0,4})(?P<after>\..+)$")
"""Tensor names of block `index`: Llama and its kin keep them in `model.layers`, GPT-NeoX in `gpt_neox.layers`."""

HEADS = ("lm_head.weight", "embed_out.weight")
"""Tensor names of the output head; with tied embeddings it is the embedding matrix once more."""

STORED_BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$")
"""Constants that older checkpoints (Pythia) store beside their parameters, and stock loading ignores."""

PER_BLOCK = ("layer", "mlp_layer", "no_rope_layer")
"""How the names of config lists with an entry per block begin, such as `layer_types`."""

BLOCK_NUMBERS = ("mlp_only_layers", "moe_layers")
"""Config lists that name single blocks."""

LEADING_BLOCKS = ("max_window_layers", "first_k_dense_replace")
"""Config values that say how many of the first blocks are of another kind."""


def check_kind(config: dict[str, Any], where: str) -> None:
    """Refuse what is not a plain text-to-text causal language model with weights as trained."""
    names = config.get("architectures") or ["unknown"]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise UserError(f"{where}: config.json does not open (architectures is no list of names)")
    name = names[0]
    if "vision_config" in config or "text_config" in config or name.endswith("ForConditionalGeneration"):
        raise UserError(f"{where}: {name} reads more than text; only text models (...ForCausalLM) are supported")
    if name.endswith("LMHeadModel"):
        raise UserError(f"{where}: {name} keeps its blocks under `h`; only blocks under `layers` are supported")
    if not name.endswith("ForCausalLM"):
        raise UserError(f"{where}: {name} is not a causal language model")
    if config.get("num_hidden_layers") is None:
        raise UserError(f"{where}: config.json has no num_hidden_layers")
    if "quantization_config" in config:
        raise UserError(
            f"{where}: its weights are quantised (quantization_config in config.json); start from the unquantised "
            "checkpoint, adapter.quantisation=nf4 makes the base of a LoRA small"
        )
    check_values(config, where)


def stated_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a `config.json` says its weights are stored in, under today's name or the former one."""
    return config.get("dtype") or config.get("torch_dtype")


def attention_for(config: Any, attention: str | None) -> str | None:
    """The attention to run a config with: SDPA has no soft cap, and would leave out Gemma 2's without a word."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if capped and attention in (None, "sdpa") else attention


def stock_config(config: dict[str, Any], where: str) -> Any:
    """The config as stock code understands it, defaults and derived lists included."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UserError(f"{where}: config.json does not open (model_type {kind} is not known to transformers)")
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(config))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{where}: config.json does not open ({reason})") from None


def _is_per_block(key: str, value: Any, num_blocks: int) -> bool:
    return key.startswith(PER_BLOCK) and isinstance(value, list) and len(value) == num_blocks


def explicit_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The stored config, with a list wherever stock code derives a block's kind from its place.

    Gemma 2 alternates two kinds of attention, SmolLM3 leaves out every fourth position coding, Qwen3-MoE makes every
    k-th block sparse: without the list, a block moved by one would change its kind.
    """
    derived = stock_config(config, where).to_dict()
    blocks = config["num_hidden_layers"]
    explicit = dict(config)
    for key, value in derived.items():
        names_blocks = key in BLOCK_NUMBERS and isinstance(value, list)
        if config.get(key) is None and (names_blocks or _is_per_block(key, value, blocks)):
            explicit[key] = value
    if (step := derived.get("decoder_sparse_step", 1)) > 1:
        dense = {block for block in range(blocks) if (block + 1) % step}
        explicit["mlp_only_layers"] = sorted(dense | set(explicit.get("mlp_only_layers") or ()))
        explicit["decoder_sparse_step"] = 1
    return explicit


def cut_config(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    """The config of the pruned model: fewer blocks, and all that is said of single blocks cut and renumbered alike."""
    cut = {key: value for key, value in config.items() if key != "auto_map"}  # the code it names stays behind
    for key, value in config.items():
        if _is_per_block(key, value, config["num_hidden_layers"]):
            cut[key] = [value[block] for block in kept]
        elif key in BLOCK_NUMBERS and isinstance(value, list):
            cut[key] = [index for index, block in enumerate(kept) if block in value]
        elif key in LEADING_BLOCKS and isinstance(value, int):
            cut[key] = sum(block < value for block in kept)
    cut["num_hidden_layers"] = len(kept)
    return cut
