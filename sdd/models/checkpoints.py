"""Checkpoints and their parts: open, describe, digest. What differs between architectures is in `architectures`.

A model is a folder with `config.json`, safetensors weights and a tokenizer. Nothing in it is run: pickled weights and
remote code are refused. Knows nothing of Hydra or the store's artifacts.
"""

import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from sdd.architectures import (
    attention_for,
    block_list,
    check_kind,
    check_shapes,
    is_tokenizer,
    scaled,
    skeleton,
    stock_config,
)
from sdd.errors import UserError
from sdd.models.chats import prepare_tokenizer
from sdd.models.files import SIDE_FILES, check_part, read_headers, side_files, view
from sdd.models.tokenizers import open_tokenizer
from sdd.store import digest_of, remembered_digest
from sdd.untrusted import parse_json, read_json, read_text

LARGEST_CONFIG = 4 << 20
"""Bytes of a `config.json`; most have one or two thousand."""

WEIGHT_FILE = re.compile(r"[\w.-]{1,200}\.safetensors")

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What of a checkpoint's generation config is obeyed."""
OVERRULED = (
    *("do_sample", "temperature", "top_p", "top_k", "max_length", "max_new_tokens", "use_cache"),
    *("transformers_version", "_from_model_config", "trust_remote_code"),
)
"""What every call said itself before, or what steers nothing."""
STEERING = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p"), 1.0),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "diversity_penalty"), 0),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "min_new_tokens", "exponential_decay_length_penalty")),
}
"""Settings of generation that old checkpoints keep in config.json, with the values at which they do nothing."""

NAMES_CODE = ("phi3",)
"""Model types whose repositories name code of their own beside a stock class, which is what is opened."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that stock loading reads; a user's mistake if there are none or one is missing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if os.path.lexists(single):
        check_part(single, folder)
        return [single]
    if os.path.lexists(index):
        names = indexed_names(folder)
        missing = [name for name in names if not os.path.lexists(folder / name)]
        if missing:
            raise UserError(f"model.path={folder}: the index names {missing[0]}, which is not there; fetch it again")
        for name in names:
            check_part(folder / name, folder)
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


def indexed_names(folder: Path) -> list[str]:
    """The weight files that the index names, sorted."""
    path = folder / "model.safetensors.index.json"
    check_part(path, folder)
    what = f"model.path={folder}: {path.name} is not a valid index"
    weight_map = read_json(path, what).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) and WEIGHT_FILE.fullmatch(name) for name in names):
        raise UserError(f"{what}; fetch it again")
    return sorted(set(names))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a causal language model with numbered blocks; anything else is a user's mistake."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"model.path={folder}: no such folder")
    if not os.path.lexists(path):
        raise UserError(f"model.path={folder}: no config.json; is this a checkpoint folder?")
    check_part(path, folder)
    text = read_text(path, f"model.path={folder}: config.json", LARGEST_CONFIG)
    config = parse_json(text, f"model.path={folder}: config.json is not valid JSON")
    if not isinstance(config, dict):
        raise UserError(f"model.path={folder}: config.json is not a JSON object")
    if "auto_map" in config and str(config.get("model_type")) not in NAMES_CODE:
        raise UserError(
            f"model.path={folder}: needs remote code (auto_map in config.json), which is never run; choose a "
            "checkpoint of an architecture that transformers knows"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"model.path={folder}: holds an adapter (adapter_config.json); merge it into a full checkpoint")
    check_kind(config, f"model.path={folder}")
    return config


def num_blocks(folder: Path) -> int:
    return int(read_config(folder)["num_hidden_layers"])


def model_digest(folder: Path, memory: Path) -> str:
    """Digest of weights, config, tokenizer, chat template and generation config, hexadecimal."""
    read_config(folder)
    files, weights = [folder / "config.json", *side_files(folder)], weight_files(folder)
    read_headers(weights)  # a file that claims more than it holds is not hashed first
    parts = {path.name: remembered_digest(path, memory) for path in [*files, *weights]}
    return digest_of(parts)


def has_chat_template(folder: Path) -> bool:
    """Whether the checkpoint brings a chat template; that of `sdd.models.chats` stands in where it does not."""
    if any(path.name in ("chat_template.jinja", "chat_template.json") for path in side_files(folder)):
        return True
    return bool(_tokenizer_config(folder).get("chat_template"))


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    if path not in side_files(folder):
        return {}
    config = read_json(path, f"model.path={folder}: tokenizer_config.json")
    if not (config.get("tokenizer_class") is None or is_tokenizer(config["tokenizer_class"])):
        raise UserError(f"model.path={folder}: tokenizer_config.json names no tokenizer as tokenizer_class")
    return config


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's own tokenizer, with a chat template and a pad token if it lacks them."""
    vocabulary = read_config(folder).get("vocab_size")
    _tokenizer_config(folder)
    try:
        with view(folder, [folder / "config.json", *side_files(folder)]) as shown:
            tokenizer = open_tokenizer(shown, vocabulary)
        tokenizer.name_or_path = str(folder)
        return prepare_tokenizer(tokenizer, vocabulary)
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

    where, config = f"model.path={folder}", read_config(folder)
    weights = weight_files(folder)
    stored = {name: tuple(entry["shape"]) for name, entry in read_headers(weights).items()}
    check_shapes(skeleton(config, where), stored, where)
    options: dict[str, Any] = {}
    if chosen := attention_for(stock_config(config, where), attention):
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
    index = [path for path in [folder / "model.safetensors.index.json"] if weights[0].name != "model.safetensors"]
    try:
        with view(folder, [folder / "config.json", *side_files(folder), *index, *weights]) as shown:
            model = AutoModelForCausalLM.from_pretrained(
                shown, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, **options
            )
    except SafetensorError as error:
        raise UserError(f"model.path={folder}: damaged safetensors file ({error})") from None
    model.generation_config = _plain_generation(model.generation_config)
    model.name_or_path = model.config._name_or_path = str(folder)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first pass in evaluation mode rounds the scales to bfloat16, and training goes on from those.
            module.support_avx512bf16_for_cpu = False
    return model.eval() if quantisation else model.to(device).eval()


def _plain_generation(shipped: Any) -> Any:
    """Where answers begin and end, as the checkpoint says it; how they are chosen is said by the config alone.

    Penalties, beams, forced or suppressed tokens that a checkpoint ships would make "greedy" mean something else.
    """
    from transformers import GenerationConfig

    return GenerationConfig(**{key: getattr(shipped, key, None) for key in ENDS})


def steers_generation(folder: Path) -> bool:
    """Whether the checkpoint ships settings that would change greedy answers if they were obeyed."""
    shipped = {key: value for key, value in read_config(folder).items() if key in STEERING}
    path = folder / "generation_config.json"
    if path.is_file():
        shipped |= read_json(path, f"model.path={folder}: generation_config.json")
    neutral: tuple[Any, ...] = (None, False, [], {})
    return any(
        value not in neutral and value != STEERING.get(key)
        for key, value in shipped.items()
        if key not in (*ENDS, *OVERRULED)
    )


def _keep_hub_kernels_out() -> None:
    """Where the package `kernels` is installed, bitsandbytes would fetch and run a kernel as it is imported.

    `sdd/__init__.py` has seen to that; bitsandbytes misses it aloud.
    """
    assert "kernels" in sys.modules, "it is kept from being imported"
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def save_model(model: Any, folder: Path, base: Path) -> None:
    """Write a stock checkpoint into `folder`, with the tokenizer and generation config of the checkpoint `base`."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()  # stock code refuses to write some that it has read
    vars(model.config).pop("auto_map", None)  # names code that is not written
    model.save_pretrained(folder)
    for name in SIDE_FILES:
        (folder / name).unlink(missing_ok=True)
    for path in side_files(base):
        shutil.copyfile(path, folder / path.name)


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
