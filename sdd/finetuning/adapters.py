"""What of a student is trained, and how it is kept: LoRA on some blocks or all, head and norms, or every parameter.

LoRA (Hu et al. 2021, arXiv 2106.09685) and trained copies of whole modules are PEFT's own, stored as its adapters. With
`full` there is no adapter: the student itself is trained, and stored as a stock checkpoint. Whatever is trained is held
in float32, since bfloat16 would round most updates away. Knows nothing of the loss, the data or the store.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.models.checkpoints import LARGEST_CONFIG, Checkpoint, blocks, save_model
from sdd.models.files import read_headers, view
from sdd.untrusted import check_inside, check_regular, read_json

TIED_BY_PEFT = ("embed_tokens",)
"""Names of embeddings whose tie to the head PEFT keeps while both are trained."""


BASE = re.compile(r"(pruned|model)/[A-Za-z0-9]{1,64}")
"""What an adapter calls its base: an address or a digest, never a place."""

NAMES = re.compile(r"[A-Za-z0-9_]{1,60}(\.[A-Za-z0-9_]{1,60}){0,10}")
"""Of modules; PEFT takes a single text for a regular expression, and a list for names."""

PATTERN = re.compile(r"\.\*\\\.[A-Za-z0-9_]{1,60}")
"""What PEFT itself writes where it stacks a mixture's experts: `.*\\.gate_up_proj`."""

DUMMY = "dummy-target-modules"
"""What PEFT calls no module to put LoRA into."""

MOST_RANK = 65_536

CHOSEN: tuple[str, ...] = ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
CHOSEN += ("layers_to_transform", "layers_pattern", "ensure_weight_tying", "base_model_name_or_path", "peft_version")
CHOSEN += ("rank_pattern", "alpha_pattern", "target_parameters")
"""What adapters of this project differ in."""

DEFAULTS: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
DEFAULTS |= {"init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16}
"""What they all say. Anything else has to be null, false or empty: it is code, a pattern or another method."""


def check_adapter(folder: Path, name: str) -> dict[str, Any]:
    """The config of an adapter as this project writes it; refused in one line before PEFT opens any other."""
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    for path in files:
        label = f"{name}: {path.name}"
        check_regular(path, label)
        check_inside(path, folder, label)
    config = read_json(files[0], f"{name}: adapter_config.json", LARGEST_CONFIG)
    for key, value in config.items():
        if key in CHOSEN:
            continue
        expected = DEFAULTS.get(key)
        if not (value == expected and type(value) is type(expected)) and not (key not in DEFAULTS and _is_none(value)):
            raise UserError(f"{name}: its adapter has {key[:60]}={str(value)[:60]}, which is not supported; retrain")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{name}: its adapter is of no known kind (peft_type in adapter_config.json); retrain")
    for key, valid in _CHECKS.items():
        if not valid(config.get(key)):
            shown = str(config.get(key))[:60]
            raise UserError(f"{name}: its adapter has {key}={shown}, which this project does not write; retrain")
    stored = {key: tensor.shape for key, tensor in read_headers(files[1:]).items()}
    for key, shape in stored.items():
        rank = {".lora_A.weight": shape[:1], ".lora_B.weight": shape[1:]}
        if any(
            key.endswith(suffix) and (len(shape) != 2 or not _is_rank(extent, config))
            for suffix, extent in rank.items()
        ):
            raise UserError(
                f"{name}: {key} of its adapter is no matrix of rank {config['r']}; retrain, or fetch it again"
            )
    return config


def _is_rank(extent: tuple[int, ...], config: dict[str, Any]) -> bool:
    """Whether an extent is the rank; experts have their own, one behind the other."""
    return extent == (config["r"],) or bool(config.get("rank_pattern") or config.get("target_parameters"))


def _is_none(value: Any) -> bool:
    return value is None or value is False or value == {} or value == []


def _is_number(value: Any, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def _are_names(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) <= 10_000
    return is_list and all(isinstance(name, str) and NAMES.fullmatch(name) for name in value)


def _are_patterns(value: Any) -> bool:
    is_table = isinstance(value, dict) and len(value) <= 100
    return is_table and all(PATTERN.fullmatch(key) and _is_number(number, 1e6) for key, number in value.items())


def _are_blocks(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 1000 and all(type(block) is int and block >= 0 for block in value)


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "r": lambda value: type(value) is int and 1 <= value <= MOST_RANK,
    "lora_alpha": lambda value: _is_number(value, 1e6),
    "lora_dropout": lambda value: _is_number(value, 1.0),
    "target_modules": lambda value: value == DUMMY or _are_names(value),
    "modules_to_save": lambda value: value is None or _are_names(value),
    "layers_to_transform": lambda value: value is None or _are_blocks(value),
    "layers_pattern": lambda value: value in (None, "layers"),
    "ensure_weight_tying": lambda value: value is None or isinstance(value, bool),
    "base_model_name_or_path": lambda value: (
        value is None or (isinstance(value, str) and BASE.fullmatch(value) is not None)
    ),
    "rank_pattern": lambda value: value is None or _are_patterns(value),
    "alpha_pattern": lambda value: value is None or _are_patterns(value),
    "target_parameters": lambda value: value is None or _are_names(value),
    "peft_version": lambda value: value is None or (isinstance(value, str) and len(value) < 100),
}


def beside_cut(kept: list[int], removed: list[int], reach: int) -> list[int]:
    """Places, in the pruned model, of the `reach` blocks on either side of every gap; a cut end has one side."""
    ends = [-1, *kept, len(kept) + len(removed)]
    places: set[int] = set()
    for place in range(len(kept) + 1):
        if ends[place + 1] - ends[place] > 1:
            places |= set(range(max(0, place - reach), min(len(kept), place + reach)))
    return sorted(places)


def adapted(model: Any, adapter: dict[str, Any], places: list[int] | None) -> Any:
    """The student to train: a PEFT model around `model`, or `model` itself for `full`.

    `adapter` is what the recipe says; `places` are the blocks that LoRA goes into, None for all of them.
    """
    from peft import get_peft_model

    method = adapter.get("method", "lora")
    if method == "full":
        student = model.requires_grad_(True)
    else:
        config = _lora(model, adapter, places) if method == "lora" else _head_and_norms(model)
        try:
            student = get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"adapter.targets={adapter.get('targets')}: {str(error).splitlines()[0]}") from None
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return student


def _lora(model: Any, adapter: dict[str, Any], places: list[int] | None) -> Any:
    from peft import LoraConfig

    targets: Any = list(adapter["targets"])
    if targets == ["all-linear"]:
        targets = "all-linear" if places is None else _linear_names(model)
    return LoraConfig(
        r=adapter["rank"],
        lora_alpha=adapter["alpha"],
        lora_dropout=adapter["dropout"],
        target_modules=targets,
        layers_to_transform=places,
        layers_pattern=None if places is None else "layers",
        task_type="CAUSAL_LM",
    )


def _linear_names(model: Any) -> list[str]:
    """PEFT takes `all-linear` for all blocks only; for some of them, the layers go by name."""
    import torch

    modules = (pair for block in blocks(model) for pair in block.named_modules())
    return sorted({name.rsplit(".", 1)[-1] for name, module in modules if isinstance(module, torch.nn.Linear)})


def _head_and_norms(model: Any) -> Any:
    """Trained copies of every norm and of the head; a tied head stays one matrix with the embeddings."""
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES

    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head.weight is embeddings.weight
    names = {module: name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    if tied and names[embeddings] not in TIED_BY_PEFT:
        raise UserError(
            f"adapter.method=head_and_norms: {type(model).__name__} ties its head to {names[embeddings]}, which PEFT "
            "cannot train as one; choose adapter=lora or adapter=full"
        )
    norms = {name for module, name in names.items() if _is_norm(module)}
    return LoraConfig(
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=sorted({*norms, names[embeddings if tied else head]}),
        ensure_weight_tying=tied,
        task_type="CAUSAL_LM",
    )


def _is_norm(module: Any) -> bool:
    return type(module).__name__.endswith("Norm") and next(module.parameters(recurse=False), None) is not None


def linear_layers(checkpoint: Checkpoint) -> set[str]:
    """The names of a checkpoint's modules with a two-dimensional weight; experts, which stock code stacks, left out."""
    matrices = {name for name, shape in checkpoint.shapes.items() if len(shape) == 2}
    return {name.removesuffix(".weight") for name in matrices if name.endswith(".weight") and ".experts." not in name}


def causal_lm(student: Any) -> Any:
    """The causal LM in training, below PEFT's wrapper if there is one."""
    from peft import PeftModel

    return student.get_base_model() if isinstance(student, PeftModel) else student


def save_student(student: Any, folder: Path, base: Checkpoint, base_name: str) -> None:
    """Write `adapter/`, its base named `base_name`, or `checkpoint/` with the side files of `base`."""
    from peft import PeftModel

    if not isinstance(student, PeftModel):
        save_model(student, folder / "checkpoint", base)
        return
    config = student.peft_config["default"]
    config.base_model_name_or_path = base_name
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set, written in another order by every process
    # "auto" would look the base's vocabulary up under that name, on the hub.
    student.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)


def merged(base: Any, adapter: Path, dtype: str | None = None) -> Any:
    """The model `base` with the adapter in the folder `adapter` merged in, without PEFT's wrapper, in `dtype`.

    `base` may be in the dtype that it is stored in: what the adapter changes is widened to float32, changed, and
    rounded once, one layer at a time; trained copies of whole modules are rounded once. None is the dtype of `base`.
    """
    import torch
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    copied = tuple(check_adapter(adapter, f"adapter {adapter}").get("modules_to_save") or ())
    target = base.dtype if dtype is None else getattr(torch, dtype)
    for name, module in base.named_modules():
        if copied and name.endswith(copied):
            module.float()
    try:
        with view(adapter, [adapter / "adapter_config.json", adapter / "adapter_model.safetensors"]) as folder:
            student = PeftModel.from_pretrained(base, str(folder))
        for layer in [module for module in student.modules() if isinstance(module, BaseTunerLayer)]:
            layer.get_base_layer().float()
            layer.merge()
            layer.get_base_layer().to(target)
        model = student.unload()
    except (RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"adapter {adapter}: does not fit its base ({reason}); retrain, or fetch it again") from None
    for parameter in model.parameters():  # buffers stay: stock loading keeps rotary frequencies in float32
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(target)
    return model
