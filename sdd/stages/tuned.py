"""Stage `tuned`: fine-tuning of the student on its targets, resumable at any checkpoint."""

import csv
import json
import logging
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.config.allowed import build
from sdd.errors import UserError
from sdd.finetuning.adapters import adapted, beside_cut, save_student
from sdd.models import checkpoints
from sdd.models.chats import training_ids
from sdd.stages.figures import learning_curve
from sdd.stages.runtime import Runtime, read_jsonl, write_json
from sdd.store import SCRATCH, Recipe

log = logging.getLogger(__name__)


def split_rows(rows: list[Any], validation_rows: int, num_rows: int | None, seed: int) -> tuple[list[Any], list[Any]]:
    """(training, validation) rows. Validation is the same for every seed; training sets of one seed are nested."""
    held_out = list(range(len(rows)))
    random.Random("validation").shuffle(held_out)
    validation, rest = held_out[:validation_rows], sorted(held_out[validation_rows:])
    random.Random(f"rows {seed}").shuffle(rest)
    return [rows[i] for i in rest[:num_rows]], [rows[i] for i in validation]


def tokenized(tokenizer: Any, rows: list[dict[str, Any]], spec: dict[str, Any]) -> tuple[list[Any], int]:
    """Training rows as token ids, and how many were over `max_length`."""
    from sdd.finetuning.module import TrainingRow

    kept = []
    for row in rows:
        ids, prompt_length = training_ids(tokenizer, row["prompt"], row["target"], spec["system_prompt"])
        if len(ids) <= spec["finetune"]["max_length"]:
            kept.append(TrainingRow(ids, prompt_length))
    return kept, len(rows) - len(kept)


def build_tuned(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`adapter/` (or `checkpoint/`, where all is trained), `history.csv`, `learning_curve.png` and `rows.json`."""
    import torch

    spec, settings = recipe.spec, recipe.spec["finetune"]
    base = inputs["pruned"] if "pruned" in inputs else runtime.source(spec["model"], "model")
    tokenizer = checkpoints.load_tokenizer(base)
    rows = list(read_jsonl(inputs["targets"] / "train.jsonl"))
    drawn, held_out = split_rows(rows, settings["validation_rows"], settings["num_rows"], spec["seed"])
    training, too_long = tokenized(tokenizer, drawn, spec)
    validation, held_out_too_long = tokenized(tokenizer, held_out, spec)
    if not training:
        raise UserError(f"finetune.max_length={settings['max_length']} is shorter than every training row")
    if too_long:
        log.warning("%d of %d rows are over finetune.max_length and left out", too_long, len(drawn))
    if held_out_too_long:
        said = "%d of %d validation rows are over finetune.max_length and left out"
        log.warning(said, held_out_too_long, len(held_out))
    torch.manual_seed(spec["seed"])
    adapter = spec["adapter"]
    dtype = "float32" if adapter.get("method") == "full" else _dtype(spec)
    model = checkpoints.load_model(base, dtype, runtime.device, runtime.attention, spec["base_quantisation"])
    checkpoints.check_logits(model)
    student = adapted(model, adapter, _places(adapter, model, inputs.get("pruned")))
    if runtime.gradient_checkpointing:
        checkpoints.recompute_activations(model)
    loss = _loss(spec, runtime)
    base_name = f"pruned/{inputs['pruned'].name}" if "pruned" in inputs else f"model/{spec['model']}"
    history = _fit(student, loss, training, validation, recipe, runtime, folder / SCRATCH)
    save_student(student, folder, base, base_name)
    with (folder / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    learning_curve(history, folder / "learning_curve.png")
    write_json(
        folder / "rows.json",
        {
            "ids": [row["id"] for row in drawn],
            "trained": len(training),
            "over_max_length": too_long,
            "target_tokens": sum(len(row.ids) - row.prompt_length for row in training),
            "validation": len(validation),
            "validation_over_max_length": held_out_too_long,
        },
    )


def _dtype(spec: dict[str, Any]) -> str:
    return {"32": "float32", "bf16": "bfloat16"}[spec["precision"]]


def _loss(spec: dict[str, Any], runtime: Runtime) -> Any:
    """Cross-entropy on the targets, or with a teacher beside the student, its distribution at every target token."""
    from sdd.finetuning.module import LogitDistillation, loss_sum

    if "distillation" not in spec:
        return loss_sum
    settings = spec["distillation"]
    folder = runtime.source(settings["teacher"], "teacher")
    teacher = checkpoints.load_model(folder, settings["dtype"], runtime.device, runtime.attention).requires_grad_(False)
    checkpoints.check_logits(teacher)
    return LogitDistillation(teacher, settings["temperature"], settings["ce_share"])


def _places(adapter: dict[str, Any], model: Any, pruned: Path | None) -> list[int] | None:
    """The blocks that the adapter goes into, by their place in the student; None for all."""
    scope = adapter.get("scope", "all")
    if scope == "all":
        return None
    if scope == "last":
        last = len(checkpoints.blocks(model))
        return list(range(last - adapter["blocks"], last))
    assert pruned is not None, "a cut is asked for before the work begins"
    cut = json.loads((pruned / "pruning.json").read_text())
    return beside_cut(cut["kept_blocks"], cut["removed_blocks"], adapter["blocks"])


def _checkpoint(scratch: Path, module: Any) -> tuple[Path | None, dict[str, Any] | None]:
    """The latest checkpoint of the module's own run in its scratch folder, and what it holds; all else is removed.

    A folder may have come from elsewhere. To begin anew costs time, and ends with the same bytes.
    """
    from sdd.finetuning.module import read_checkpoint

    if scratch.is_symlink():
        scratch.unlink()
    scratch.mkdir(exist_ok=True)
    kept: tuple[Path | None, dict[str, Any] | None] = None, None
    for path in sorted(scratch.iterdir(), key=lambda path: path.lstat().st_mtime, reverse=True):
        if kept[1] is None and path.suffix == ".ckpt":
            if (found := read_checkpoint(path, module)) is not None:
                kept = path, found
                continue
            log.warning("%r in %s is no checkpoint of this run, or damaged; it is removed", path.name, scratch)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return kept


def _fit(
    student: Any,
    loss: Any,
    training: list[Any],
    validation: list[Any],
    recipe: Recipe,
    runtime: Runtime,
    scratch: Path,
) -> list[dict[str, Any]]:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.plugins.environments import LightningEnvironment

    from sdd.finetuning.module import Optimisation, StudentModule, WholeCheckpoints, step_rows

    settings, seed = recipe.spec["finetune"], recipe.spec["seed"]
    plan = step_rows(len(training), settings["batch_size"], settings["epochs"], seed)
    optimisation = Optimisation(
        settings["learning_rate"],
        settings["weight_decay"],
        settings["warmup_share"],
        settings["clip_norm"],
        seed,
        len(plan),
        len(plan) // settings["epochs"],
    )
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with tqdm(total=len(plan), desc="tune", unit="step") as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")

        def on_step(step: int, logged: dict[str, float]) -> None:
            progress.n = step - 1
            progress.update(1)
            progress.set_postfix(loss=f"{logged['loss']:.4f}", refresh=False)

        module = StudentModule(
            student,
            training,
            plan,
            validation,
            optimisation,
            runtime.micro_batch_tokens,
            on_step=on_step,
            loss=loss,
            run=recipe.address,
        )
        saved, resumed = _checkpoint(scratch, module)
        keeping = ModelCheckpoint(scratch, "{step}", every_n_train_steps=runtime.checkpoint_every, save_top_k=1)
        trainer = pl.Trainer(
            accelerator=runtime.accelerator,
            devices=runtime.devices,
            precision={"32": "32-true", "bf16": "bf16-mixed"}[recipe.spec["precision"]],  # type: ignore[arg-type]
            max_steps=len(plan),
            max_epochs=-1,
            logger=_logger(recipe, runtime),
            callbacks=[keeping],
            # Slurm's environment would write on a signal, and load, checkpoints that are not this run's.
            plugins=[WholeCheckpoints(resumed), LightningEnvironment()],
            default_root_dir=scratch,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        del resumed  # the plugin hands it over, and then it is gone
        try:
            trainer.fit(module, ckpt_path=saved)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if saved is None or module.began:
                raise
            saved.unlink()
            raise UserError(
                f"{saved}: training cannot go on from it ({type(error).__name__}); it is removed, run the same again"
            ) from None
    _finish_logger(trainer.logger)
    assert len(module.history) == len(plan), f"{len(module.history)} steps recorded of {len(plan)}"
    return module.history


def _logger(recipe: Recipe, runtime: Runtime) -> Any:
    """The configured tracker with the artifact's address as its run id; False (history.csv only) by default."""
    if "_target_" not in runtime.logger:
        return False
    runtime.run_folder.mkdir(parents=True, exist_ok=True)
    mode = recipe.inputs["targets"].spec["mode"]
    name = f"{mode}-{recipe.labels.get('dataset', '')}-{recipe.spec['seed']}"
    config = {"stage": recipe.stage, "address": recipe.address, "spec": recipe.spec}
    return build(runtime.logger, id=recipe.address, name=name, save_dir=str(runtime.run_folder), config=config)


def _finish_logger(logger: Any) -> None:
    if logger is not None and hasattr(logger, "experiment") and hasattr(logger.experiment, "finish"):
        logger.experiment.finish()
