"""Checkpoints and their parts: open, describe, digest. What differs between architectures is in `architectures`.

A model is a folder with `config.json`, safetensors weights and a tokenizer. Nothing in it is run: pickled weights and
remote code are refused. Knows nothing of Hydra or the store's artifacts.
"""

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from sdd.architectures import attention_for, block_list, check_kind, scaled, stock_config
from sdd.errors import UserError
from sdd.prompts import prepare_tokenizer
from sdd.store import digest_of, remembered_digest
from sdd.tokenizer_files import open_tokenizer
from sdd.untrusted import read_json

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What a checkpoint carries besides weights and config, as far as it decides what the model says."""

NAMES_CODE = ("phi3",)
"""Model types whose repositories name code of their own beside a stock class, which is what is opened."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that stock loading reads; a user's mistake if there are none or one is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if not names or any(Path(name).name != name for name in names):
                raise ValueError("no plain file names")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"model.path={folder}: model.safetensors.index.json is not a valid index") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"model.path={folder}: the index names {missing[0]}, which is not there; fetch it again")
        return [folder / name for name in names]
    if next(folder.glob("*.safetensors"), None):
        raise UserError(
            f"model.path={folder}: safetensors files, but no model.safetensors and no model.safetensors.index.json; "
            "fetch it again"
        )
    pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")), None)
    if pickled:
        raise UserError(
            f"model.path={folder}: the weights are pickled ({pickled}), which can run code; convert them to safetensors"
        )
    raise UserError(
        f"model.path={folder}: no safetensors weights; fetch it again, or choose a checkpoint that has them"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a causal language model with numbered blocks; anything else is a user's mistake."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"model.path={folder}: no such folder")
    if not path.is_file():
        raise UserError(f"model.path={folder}: no config.json; is this a checkpoint folder?")
    try:
        config = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"model.path={folder}: config.json is not valid JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"model.path={folder}: config.json is not a JSON object")
    if "auto_map" in config and config.get("model_type") not in NAMES_CODE:
        raise UserError(
            f"model.path={folder}: needs remote code (auto_map in config.json), which is never run; choose a "
            "checkpoint of an architecture that transformers knows"
        )
    if "/" in str(config.get("attn_implementation", config.get("_attn_implementation"))):
        raise UserError(f"model.path={folder}: needs an attention kernel from a hub (config.json), which is never run")
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"model.path={folder}: holds an adapter (adapter_config.json); merge it into a full checkpoint")
    check_kind(config, f"model.path={folder}")
    return config


def num_blocks(folder: Path) -> int:
    return int(read_config(folder)["num_hidden_layers"])


def model_digest(folder: Path, memory: Path) -> str:
    """Digest of weights, config, tokenizer, chat template and generation config, hexadecimal."""
    read_config(folder)
    files = [folder / "config.json", *(folder / name for name in SIDE_FILES if (folder / name).is_file())]
    parts = {path.name: remembered_digest(path, memory) for path in [*files, *weight_files(folder)]}
    return digest_of(parts)


def has_chat_template(folder: Path) -> bool:
    """Whether the checkpoint brings a chat template; the plain one of `sdd.prompts` stands in where it does not."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    what = f"model.path={folder}: tokenizer_config.json"
    return path.exists() and bool(read_json(path, what).get("chat_template"))


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own tokenizer, with a chat template and a pad token if it lacks them."""
    vocabulary = read_config(folder).get("vocab_size")
    try:
        return prepare_tokenizer(open_tokenizer(folder, vocabulary), vocabulary)
    except UserError as error:
        raise UserError(f"model.path={folder}: {error}") from None


def load_model(
    folder: Path, dtype: str, device: str = "cpu", attention: str | None = None, quantisation: str | None = None
) -> Any:
    """A stock causal LM in evaluation mode, in `dtype` ("float32", "bfloat16", "float16").

    `quantisation="nf4"` keeps the linear layers of the blocks in 4 bits, as QLoRA does (arXiv 2305.14314): nf4 values
    with doubly quantised scales, computed in `dtype`.
    """
    _keep_hub_kernels_out()
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = read_config(folder)
    weight_files(folder)
    options: dict[str, Any] = {}
    if chosen := attention_for(stock_config(config, f"model.path={folder}"), attention):
        options["attn_implementation"] = chosen
    if quantisation is not None:
        assert quantisation == "nf4", f"no quantisation {quantisation}"
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, **options
        )
    except SafetensorError as error:
        raise UserError(f"model.path={folder}: damaged safetensors file ({error})") from None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first pass in evaluation mode rounds the scales to bfloat16, and training goes on from those.
            module.support_avx512bf16_for_cpu = False
    return model.eval() if quantisation else model.to(device).eval()


def _keep_hub_kernels_out() -> None:
    """Where the package `kernels` is installed, bitsandbytes fetches and runs a kernel from a hub as it is imported."""
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # it misses that kernel aloud


def save_model(model: Any, folder: Path, base: Path) -> None:
    """Write a stock checkpoint into `folder`, with the tokenizer and generation config of the checkpoint `base`."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()  # stock code refuses to write some that it has read
    vars(model.config).pop("auto_map", None)  # names code that is not written
    model.save_pretrained(folder)
    for name in SIDE_FILES:
        (folder / name).unlink(missing_ok=True)
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def recompute_activations(model: Any) -> None:
    """Keep one state a block in training and compute the rest again in the backward pass: less memory, more time.

    `model` has its adapter in place already, since PEFT asks for gradients of the embeddings where it finds this on.
    """
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"trainer.gradient_checkpointing: {str(error).splitlines()[0]}; leave it out") from None
    model.disable_input_require_grads()  # only the reentrant kind needs them, and they would cost frozen first blocks


def decoder(model: Any) -> Any:
    """The part of a causal LM below the head: embeddings, blocks, final norm."""
    return model.get_decoder()


def blocks(model: Any) -> Any:
    """The list of transformer blocks, in order."""
    return block_list(model)


def head_logits(model: Any, hidden: Any) -> Any:
    """Logits of chosen hidden states, as the model's own forward makes them: (N, hidden) -> (N, vocabulary)."""
    return scaled(model.get_output_embeddings()(hidden), model.config)


def check_logits(model: Any) -> None:
    """Refuse a model whose own forward ends otherwise than `head_logits`: it would be trained on another's loss."""
    import torch

    with torch.no_grad():
        ids = torch.arange(4, device=model.device)[None]
        own = model(input_ids=ids, use_cache=False).logits
        made = head_logits(model, decoder(model)(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(own.float(), made.float(), rtol=2e-2, atol=1e-2 * float(own.abs().max())):
        raise UserError(f"{type(model).__name__} makes its logits in a way that is not known here; not supported")
