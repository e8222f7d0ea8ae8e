"""A checkpoint as one object, described, digested and opened; then what is asked of an open model.

A model is a folder with `config.json`, safetensors weights and a tokenizer. Nothing in it is run: pickled weights and
remote code are refused. What differs between architectures is in `architectures`. Knows nothing of Hydra or the
store's artifacts.
"""

import logging
import math
import os
import shutil
import sys
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

from sdd.architectures import (
    BLOCK_NAME,
    HEADS,
    STORED_BUFFERS,
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
from sdd.models.files import (
    CODES,
    FLOATS,
    SIDE_FILES,
    StoredTensor,
    check_part,
    indexed_names,
    read_headers,
    side_files,
    view,
)
from sdd.models.garbage import look_as_usual, pass_over_modules
from sdd.models.generation import plain_generation, steers
from sdd.models.spread import Spread
from sdd.models.tokenizers import open_tokenizer
from sdd.store import digest_of, remembered_digest
from sdd.untrusted import parse_json, read_json, read_text

LARGEST_CONFIG = 4 << 20
"""Bytes of a `config.json`; most have one or two thousand."""

opened: WeakSet[Any] = WeakSet()
"""Models that were opened in this process and are still there."""

NAMES_CODE = ("phi3",)
"""Model types whose repositories name code of their own beside a stock class, which is what is opened."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that is a checkpoint, or turns out to be none when it is looked at. What is read once is kept.

    Make another one where the folder is to be read again.
    """

    folder: Path

    @property
    def where(self) -> str:
        """How messages about it begin."""
        return f"model.path={self.folder}"

    @property
    def config(self) -> dict[str, Any]:
        """`config.json` of a causal language model with numbered blocks; anything else is a user's mistake.

        A copy each time, since stock code writes into what it is given.
        """
        return deepcopy(self._config)

    @cached_property
    def _config(self) -> dict[str, Any]:
        folder, path = self.folder, self.folder / "config.json"
        if not folder.is_dir():
            raise UserError(f"{self.where}: no such folder")
        if not os.path.lexists(path):
            inner = next((path.parent.name for path in sorted(folder.glob("*/config.json"))), None)
            advice = f"{inner}, in it, has one" if inner else "is this a checkpoint folder?"
            raise UserError(f"{self.where}: no config.json; {advice}")
        check_part(path, folder)
        text = read_text(path, f"{self.where}: config.json", LARGEST_CONFIG)
        config = parse_json(text, f"{self.where}: config.json is not valid JSON")
        if not isinstance(config, dict):
            raise UserError(f"{self.where}: config.json is not a JSON object")
        if "auto_map" in config and str(config.get("model_type")) not in NAMES_CODE:
            raise UserError(
                f"{self.where}: needs remote code (auto_map in config.json), which is never run; choose a "
                "checkpoint of an architecture that transformers knows"
            )
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{self.where}: holds an adapter (adapter_config.json); merge it into a full checkpoint")
        check_kind(config, self.where)
        return config

    @property
    def num_blocks(self) -> int:
        return int(self._config["num_hidden_layers"])

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that stock loading reads; a user's mistake if there are none or one is missing."""
        folder = self.folder
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if os.path.lexists(single):
            check_part(single, folder)
            return [single]
        if os.path.lexists(index):
            names = indexed_names(folder)
            missing = [name for name in names if not os.path.lexists(folder / name)]
            if missing:
                raise UserError(f"{self.where}: the index names {missing[0]}, which is not there; fetch it again")
            for name in names:
                check_part(folder / name, folder)
            return [folder / name for name in names]
        if next(folder.glob("*.safetensors"), None):
            raise UserError(
                f"{self.where}: safetensors files, but no model.safetensors and no model.safetensors.index.json; "
                "fetch it again"
            )
        pickled = next((path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth")), None)
        if pickled:
            raise UserError(
                f"{self.where}: the weights are pickled ({pickled}), which can run code; convert them to safetensors"
            )
        raise UserError(f"{self.where}: no safetensors weights; fetch it again, or choose a checkpoint that has them")

    @property
    def side_files(self) -> list[Path]:
        """What goes with config and weights: tokenizer, chat template, generation config."""
        return side_files(self.folder)

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All stored tensors by name; reads headers only."""
        return read_headers(self.weight_files)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @cached_property
    def block_tensors(self) -> dict[int, dict[str, StoredTensor]]:
        """Block -> its tensors by their names within it, such as "mlp.down_proj.weight"."""
        blocks: dict[int, dict[str, StoredTensor]] = {}
        for name, tensor in self.tensors.items():
            if match := BLOCK_NAME.match(name):
                blocks.setdefault(int(match["index"]), {})[match["after"].removeprefix(".")] = tensor
        return blocks

    @property
    def num_parameters(self) -> int:
        """Stored parameters; a tied tensor counts once, constants stored beside them do not."""
        left_out = HEADS if self._config.get("tie_word_embeddings", False) else ()
        counted = (tensor for name, tensor in self.tensors.items() if not STORED_BUFFERS.search(name))
        return sum(math.prod(tensor.shape) for tensor in counted if tensor.name not in left_out)

    @property
    def dtypes(self) -> set[str]:
        """Those of the tensors, as headers name them ("BF16")."""
        return {tensor.dtype for tensor in self.tensors.values()}

    @property
    def stored_dtype(self) -> str:
        """The dtype that all weights fit in without rounding; float32 where they have several."""
        return next((dtype for dtype, code in CODES.items() if self.dtypes & FLOATS == {code}), "float32")

    def digest(self, memory: Path) -> str:
        """Digest of weights, config, tokenizer, chat template and generation config, hexadecimal."""
        _ = self._config, self.tensors  # what is refused is not hashed first
        files = [self.folder / "config.json", *self.side_files, *self.weight_files]
        return digest_of({path.name: remembered_digest(path, memory) for path in files})

    @property
    def ending_ids(self) -> list[int]:
        """The token ids that end an answer by its own word, as stock loading has them in the generation config."""
        path = self.folder / "generation_config.json"
        given = read_json(path, f"{self.where}: generation_config.json") if path.is_file() else {}
        listed = given.get("eos_token_id", self._config.get("eos_token_id"))
        return [one for one in (listed if isinstance(listed, list) else [listed]) if isinstance(one, int)]

    @property
    def steers_generation(self) -> bool:
        """Whether the checkpoint ships settings that would change greedy answers if they were obeyed."""
        config, path = self._config, self.folder / "generation_config.json"
        return steers(config, read_json(path, f"{self.where}: generation_config.json") if path.is_file() else {})

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint brings a chat template; that of `sdd.models.chats` stands in where it does not."""
        if any(path.name in ("chat_template.jinja", "chat_template.json") for path in self.side_files):
            return True
        return bool(self._tokenizer_config().get("chat_template"))

    def _tokenizer_config(self) -> dict[str, Any]:
        path = self.folder / "tokenizer_config.json"
        if path not in self.side_files:
            return {}
        config = read_json(path, f"{self.where}: tokenizer_config.json")
        if not (config.get("tokenizer_class") is None or is_tokenizer(config["tokenizer_class"])):
            raise UserError(f"{self.where}: tokenizer_config.json names no tokenizer as tokenizer_class")
        return config

    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer, with a chat template and a pad token if it lacks them."""
        vocabulary = self._config.get("vocab_size")
        self._tokenizer_config()
        try:
            with view(self.folder, [self.folder / "config.json", *self.side_files]) as shown:
                tokenizer = open_tokenizer(shown, vocabulary)
            tokenizer.name_or_path = str(self.folder)
            return prepare_tokenizer(tokenizer, vocabulary)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None

    def model(
        self,
        dtype: str,
        device: str | Spread = "cpu",
        attention: str | None = None,
        quantisation: str | None = None,
    ) -> Any:
        """A stock causal LM in evaluation mode, in `dtype` ("float32", "bfloat16", "float16"), on one device or spread.

        `quantisation="nf4"` keeps the linear layers of the blocks in 4 bits, as QLoRA does (arXiv 2305.14314): nf4
        values with doubly quantised scales, computed in `dtype`.
        """
        _keep_hub_kernels_out()
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        folder, where, config, shapes = self.folder, self.where, self.config, self.shapes
        check_shapes(skeleton(config, where), shapes, where)
        if not opened:
            pass_over_modules()
        look_as_usual()
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
        held = ExitStack()
        if isinstance(device, Spread):
            options |= device.options(held)
        weights = self.weight_files
        index = [] if weights[0].name == "model.safetensors" else [folder / "model.safetensors.index.json"]
        try:
            with held:
                shown = held.enter_context(view(folder, [folder / "config.json", *self.side_files, *index, *weights]))
                model = AutoModelForCausalLM.from_pretrained(
                    shown, dtype=getattr(torch, dtype), use_safetensors=True, trust_remote_code=False, **options
                )
                if isinstance(device, Spread):  # what stays on the disk is read from there, pass by pass
                    model = device.settled(model, held.pop_all())
        except SafetensorError as error:
            raise UserError(f"{where}: damaged safetensors file ({error})") from None
        model.generation_config = plain_generation(model.generation_config)
        model.name_or_path = model.config._name_or_path = str(folder)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Else the first pass in evaluation mode rounds the scales to bfloat16, and training goes on from those.
                module.support_avx512bf16_for_cpu = False
        opened.add(model)
        return model.eval() if quantisation or isinstance(device, Spread) else model.to(device).eval()


def _keep_hub_kernels_out() -> None:
    """Where the package `kernels` is installed, bitsandbytes would fetch and run a kernel as it is imported.

    `sdd/__init__.py` has seen to that; bitsandbytes misses it aloud.
    """
    assert "kernels" in sys.modules, "it is kept from being imported"
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def save_model(model: Any, folder: Path, base: Checkpoint) -> None:
    """Write a stock checkpoint into `folder`, with the tokenizer and generation config of `base`."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()  # stock code refuses to write some that it has read
    vars(model.config).pop("auto_map", None)  # names code that is not written
    model.save_pretrained(folder)
    for name in SIDE_FILES:
        (folder / name).unlink(missing_ok=True)
    for path in base.side_files:
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
