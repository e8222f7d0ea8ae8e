"""What of a student is trained, and how it is kept: LoRA on some blocks or all, head and norms, or every parameter.

LoRA (Hu et al. 2021, arXiv 2106.09685) and trained copies of whole modules are PEFT's own, stored as its adapters. With
`full` there is no adapter: the student itself is trained, and stored as a stock checkpoint. Whatever is trained is held
in float32, since bfloat16 would round most updates away. Knows nothing of the loss, the data or the store.
"""

from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.models import blocks, save_model

TIED_BY_PEFT = ("embed_tokens",)
"""Names of embeddings whose tie to the head PEFT keeps while both are trained."""


def beside_cut(kept: list[int], removed: list[int], reach: int) -> list[int]:
    """Places, in the pruned model, of the `reach` blocks on either side of every gap; a cut end has one side."""
    ends = [-1, *kept, len(kept) + len(removed)]
    chosen: set[int] = set()
    for place in range(len(kept) + 1):
        if ends[place + 1] - ends[place] > 1:
            chosen |= set(range(max(0, place - reach), min(len(kept), place + reach)))
    return sorted(chosen)


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

    named = (pair for block in blocks(model) for pair in block.named_modules())
    return sorted({name.rsplit(".", 1)[-1] for name, module in named if isinstance(module, torch.nn.Linear)})


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


def causal_lm(student: Any) -> Any:
    """The causal LM in training, below PEFT's wrapper if there is one."""
    from peft import PeftModel

    return student.get_base_model() if isinstance(student, PeftModel) else student


def save_student(student: Any, folder: Path, base: Path, base_name: str) -> None:
    """Write `adapter/`, its base named `base_name`, or `checkpoint/` with the side files of the folder `base`."""
    from peft import PeftModel

    if not isinstance(student, PeftModel):
        save_model(student, folder / "checkpoint", base)
        return
    saved = student.peft_config["default"]
    saved.base_model_name_or_path = base_name
    if not isinstance(saved.target_modules, str):
        saved.target_modules = sorted(saved.target_modules)  # a set, written in another order by every process
    # "auto" would look the base's vocabulary up under that name, on the hub.
    student.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
    (folder / "adapter" / "README.md").unlink(missing_ok=True)


def merged(base: Any, adapter: Path) -> Any:
    """The model `base` with the adapter in the folder `adapter` merged in, without PEFT's wrapper."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
