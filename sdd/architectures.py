"""What is known of architectures, in one place: names of blocks, what configs say of single ones, how logits end.

What is not known is derived: lists per block are those that stock code makes of the config, and whether a cut is right
is read off the module tree, built without memory before and after the cut. A block that would change its kind, window,
position coding or scale by moving to another place, where no config entry can say otherwise, is refused, never bent.
Knows nothing of weights, files or scores.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdd.errors import UserError

BLOCK_NAME = re.compile(r"^(?P<before>(?:.+?\.)?layers\.)(?P<index>\d+)(?P<after>\..+)$")
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

PLACE = ("layer_idx", "layer_id", "layer_index", "layer_number")
"""Attributes of a module that say where its block stands, and are meant to follow it."""

MLPS: tuple[tuple[tuple[str, ...], str, int], ...] = (
    (("gate_proj", "up_proj"), "down_proj", 1),
    (("gate_up_proj",), "down_proj", 2),
    (("up_proj",), "down_proj", 1),
    (("dense_h_to_4h",), "dense_4h_to_h", 1),
    (("c_fc",), "c_proj", 1),
    (("fc1",), "fc2", 1),
)
"""Linear layers of an MLP: those into its channels, the one out of them, and how often each of the first holds all
channels: Llama and its kin, Phi-3's gate above up in one matrix, Nemotron, GPT-NeoX, StarCoder2, Phi."""

DOWN = tuple({out for _, out, _ in MLPS})
"""Names of the linear layer that ends an MLP."""

MULTIPLIED = {"logit_scale": ("cohere", "cohere2"), "logits_scaling": ("hyperclovax",)}
DIVIDED = {"logits_scaling": ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid", "granite_swa")}
"""Config values by which the head's output is scaled, and the model types that do."""


def check_kind(config: dict[str, Any], where: str) -> None:
    """Refuse what is not a plain text-to-text causal language model with weights as trained."""
    name = str((config.get("architectures") or ["unknown"])[0])
    if "vision_config" in config or "text_config" in config or name.endswith("ForConditionalGeneration"):
        raise UserError(f"{where}: {name} reads more than text; only text models (...ForCausalLM) are supported")
    if name.endswith("LMHeadModel"):
        raise UserError(f"{where}: {name} keeps its blocks under `h`; only blocks under `layers` are supported")
    if not name.endswith("ForCausalLM"):
        raise UserError(f"{where}: {name} is not a causal language model")
    if not isinstance(config.get("num_hidden_layers"), int):
        raise UserError(f"{where}: config.json has no num_hidden_layers")
    if "quantization_config" in config:
        raise UserError(
            f"{where}: its weights are quantised (quantization_config in config.json); start from the unquantised "
            "checkpoint, adapter.quantisation=nf4 makes the base of a LoRA small"
        )


def attention_for(config: Any, asked: str | None) -> str | None:
    """The attention to run a config with: SDPA has no soft cap, and would leave out Gemma 2's without a word."""
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if capped and asked in (None, "sdpa") else asked


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


# ---- configs ----------------------------------------------------------------------------------------------------


def stock_config(config: dict[str, Any], where: str) -> Any:
    """The config as stock code understands it, defaults and derived lists included."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
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
    found = dict(config)
    for key, value in derived.items():
        named = key in BLOCK_NUMBERS and isinstance(value, list)
        if config.get(key) is None and (named or _is_per_block(key, value, blocks)):
            found[key] = value
    if (step := derived.get("decoder_sparse_step", 1)) > 1:
        dense = {block for block in range(blocks) if (block + 1) % step}
        found["mlp_only_layers"] = sorted(dense | set(found.get("mlp_only_layers") or ()))
        found["decoder_sparse_step"] = 1
    return found


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


# ---- module trees -----------------------------------------------------------------------------------------------


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
        if differing := _differing(_facts(before[block]), _facts(after[index])):
            raise UserError(
                f"{where}: {name} would make another block of block {block} at place {index} ({differing}), and its "
                "config cannot say otherwise; not pruned"
            )
    if differing := _differing(_surroundings(whole), _surroundings(smaller)):
        raise UserError(f"{where}: {name} has more that depends on the number of blocks ({differing}); not pruned")


def _facts(block: Any) -> dict[str, Any]:
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


def _differing(a: dict[str, Any], b: dict[str, Any]) -> str:
    """The first entry in which two tables differ, in words; empty if none does."""
    for key in [*a, *b]:
        if a.get(key) != b.get(key):
            return f"{key.lstrip('.:')}: {a.get(key)} or {b.get(key)}"
    return ""


# ---- MLPs -------------------------------------------------------------------------------------------------------


def down_projection(block: Any) -> str | None:
    """Where in a block the last linear layer of its one MLP is, such as `mlp.down_proj`; None for any other MLP.

    That of a single expert, shared or not, lies deeper and is none.
    """
    import torch

    named = (name for name, module in block.named_modules() if isinstance(module, torch.nn.Linear))
    found = [name for name in named if name.count(".") == 1 and name.endswith(DOWN)]
    return found[0] if len(found) == 1 else None


def refittable(config: dict[str, Any], where: str) -> dict[int, str]:
    """Blocks whose output is their down projection's plus what does not depend on it, and where that projection is.

    Read off the module tree, then tried: in a model of the one block, all its weights zero and so without memory, what
    is added to the projection's output has to come out of the block unchanged. A norm or a scale in between shows.
    `config` is explicit.
    """
    blocks = block_list(skeleton(config, where))
    known: dict[str, bool] = {}
    found = {}
    for index, block in enumerate(blocks):
        name = down_projection(block)
        if name is None:
            continue
        kind = repr(sorted(_facts(block).items()))
        if kind not in known:
            known[kind] = _adds_as_it_is(skeleton(cut_config(config, [index]), where), name)
        if known[kind]:
            found[index] = name
    return found


def _make_zeros(module: Any) -> None:
    """Put zeros in place of a module's own tensors, each a single number however large its shape."""
    import torch

    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                zeros = torch.zeros(()).expand(tensor.shape)
                table[name] = torch.nn.Parameter(zeros, requires_grad=False) if table is module._parameters else zeros


def _adds_as_it_is(model: Any, name: str) -> bool:
    """Whether what is added to the output of the only block's module `name` is added to the block's output."""
    import torch

    body, (block,) = model.get_decoder(), block_list(model)
    width = block.get_submodule(name).out_features
    for part in body.children():
        if part is not model.get_input_embeddings():
            for module in part.modules():
                _make_zeros(module)
    draw = torch.Generator().manual_seed(0)
    states, added = (torch.randn(1, 3, width, generator=draw) for _ in range(2))
    left: list[Any] = []

    def keep(module: Any, arguments: Any, output: Any) -> None:
        left.append(output[0] if isinstance(output, tuple) else output)

    def add(module: Any, arguments: Any, output: Any) -> Any:
        return output + added

    block.register_forward_hook(keep)
    try:
        with torch.no_grad():
            body(inputs_embeds=states, use_cache=False)
            block.get_submodule(name).register_forward_hook(add)
            body(inputs_embeds=states, use_cache=False)
    except Exception:
        return False  # more than states goes in, or not these come out: a block of no kind known here
    return bool(torch.allclose(left[1] - left[0], added, atol=1e-4))


@dataclass(frozen=True)
class MLP:
    """A block's MLP by the names of its linear layers within the block, and its sizes.

    A channel is a row of every layer in `into` (of each of its `stacks` parts) and a column of `out`.
    """

    into: tuple[str, ...]
    out: str
    stacks: int
    width: int
    hidden: int


def find_mlp(shapes: Mapping[str, tuple[int, ...]], where: str) -> MLP:
    """The MLP of a block, from its parameters' names (within the block) and shapes; an unknown one is refused.

    Mixtures of experts have several, or matrices of three dimensions, and no width that is one number.
    """
    found = []
    for into, out, stacks in MLPS:
        for name, shape in shapes.items():
            parent, layer = _split(name.removesuffix(".weight"))
            names = tuple(parent + one for one in into)
            fitting = name.endswith(".weight") and layer == out and len(shape) == 2
            if fitting and all(shapes.get(f"{one}.weight") == (stacks * shape[1], shape[0]) for one in names):
                found.append(MLP(names, parent + out, stacks, shape[1], shape[0]))
    # Gate and up together hold the plain form's two names as well.
    found = [mlp for mlp in found if not any(set(mlp.into) < set(other.into) for other in found)]
    if len(found) != 1 or any("expert" in name for name in shapes):
        kind = "a mixture of experts" if any("expert" in name for name in shapes) else "linear layers of other names"
        raise UserError(f"{where}: its MLP is not known here ({kind}), so no channel can be removed; prune blocks")
    return found[0]


def _split(name: str) -> tuple[str, str]:
    """`mlp.up_proj` -> (`mlp.`, `up_proj`)."""
    parent, dot, layer = name.rpartition(".")
    return parent + dot, layer


def check_width(config: dict[str, Any], mlp: MLP, width: int, where: str) -> None:
    """Refuse a width cut after which stock code would make another model than the one with narrower MLPs.

    `config` is explicit; every block holds the layers of `mlp`. Seconds at most, whatever the size of the model.
    """
    narrow = skeleton(config | {"intermediate_size": width}, where)
    expected = {name: mlp_shape(mlp, name, shape, width) for name, shape in block_shapes(skeleton(config, where))}
    if differing := _differing(expected, dict(block_shapes(narrow))):
        raise UserError(f"{where}: stock code makes other blocks of a narrower MLP ({differing}); not pruned")


def block_shapes(model: Any) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every parameter of a model."""
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def mlp_shape(mlp: MLP, name: str, shape: tuple[int, ...], width: int) -> tuple[int, ...]:
    """The shape that a parameter, by its full name, has where MLPs are `width` wide."""
    match = BLOCK_NAME.match(name)
    layer, _, kind = match["after"].removeprefix(".").rpartition(".") if match else ("", "", "")
    if layer in mlp.into:
        return (mlp.stacks * width, *shape[1:])
    return (shape[0], width) if layer == mlp.out and kind == "weight" else shape


def mlp_layers(block: Any, mlp: MLP) -> tuple[list[Any], Any]:
    """The linear modules of a block's MLP: those into its channels, and the one out of them."""
    return [block.get_submodule(name) for name in mlp.into], block.get_submodule(mlp.out)


def mlp_of(model: Any) -> MLP:
    """The MLP that the blocks of a causal LM share."""
    shapes = {name: tuple(parameter.shape) for name, parameter in block_list(model)[0].named_parameters()}
    return find_mlp(shapes, type(model).__name__)
