"""Stage `tuned`: fine-tuning of the student on its targets, resumable at any checkpoint."""

import csv
import json
import logging
import shutil
import signal
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.config import plain
from sdd.config.allowed import build as build_part
from sdd.config.parts import TENSORBOARD
from sdd.data import Example
from sdd.errors import UserError
from sdd.finetuning.adapters import adapted, beside_cut, causal_lm, linear_layers, save_student
from sdd.finetuning.losses import LOSSES, PLAIN, SETTINGS
from sdd.finetuning.modes import MODES, ROLLOUTS, VALIDATIONS
from sdd.forward import ranks
from sdd.models import checkpoints
from sdd.models.chats import training_ids
from sdd.models.checkpoints import Checkpoint
from sdd.models.rendering import RefusalError
from sdd.planning import estimates
from sdd.planning.cost_model import BYTES, CostModel
from sdd.planning.estimates import Estimate, Training
from sdd.stages import damaged, draws, pruned, rolled, targets, taught
from sdd.stages.figures import learning_curve
from sdd.stages.handover import Handover
from sdd.stages.runtime import Runtime
from sdd.stages.sharing import shared
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.store import SCRATCH, Recipe
from sdd.store.files import Lines, read_facts, write_json
from sdd.study import Study

log = logging.getLogger(__name__)

CACHE = ("cached", "cached_k", "cached_bits")
"""Settings of the stage `taught`."""
PRECISIONS = {"32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Tuned(Spec):
    """`model` where nothing was pruned, else the input `pruned`; `distillation` where the loss is another than
    cross-entropy, with the teacher if it needs one; `micro_batch_tokens`, and `devices` where there are several, where
    dropout's draws follow the passes."""

    adapter: dict[str, Any]
    base_quantisation: str | None
    precision: str
    finetune: dict[str, Any]
    system_prompt: str | None
    seed: int
    chat_template: str | None = None
    distillation: dict[str, Any] | None = None
    micro_batch_tokens: int | None = None
    devices: int | None = None
    model: str | None = None


# ---- what is asked for --------------------------------------------------------------------------------------------


def recipe(study: Study) -> Recipe:
    config, models = study.config, study.models
    finetune = config.finetune
    if (rows := study.rows.source.known_rows()) is not None:
        check_rows(study, rows)
    _check_adapter(study)
    settings = plain(finetune) | {"validation_rows": study.validation_rows}
    of_targets = ("mode", "request", "select", "choice", "gold_share", "noise_share")
    for key in (*of_targets, "ce_share", "loss", "precision", *SETTINGS, *ROLLOUTS, *CACHE):
        settings.pop(key)
    if not finetune.same_rows:
        settings.pop("same_rows")
    settings = draws.key_of(settings)
    if settings["keep"] == "last":
        settings.pop("keep")
    elif not study.validation_rows:
        raise UserError("finetune.keep=best needs held-out rows; raise finetune.validation_rows, or keep the last")
    adapter = _adapter_spec(study)
    inputs, cut = {"targets": targets.recipe(study)}, pruned.recipe(study)
    if asked := draws.needs_damage(settings):
        inputs["damaged"] = damaged.recipe(study, f"finetune.{asked}")
    if taught.is_asked(study):
        inputs["taught"] = taught.recipe(study)
    together = config.trainer.devices * config.trainer.num_nodes
    spec = Tuned(
        adapter=adapter,
        base_quantisation=config.adapter.quantisation,
        precision=finetune.precision,
        finetune=settings,
        system_prompt=config.dataset.system_prompt,
        seed=config.seed,
        chat_template=models.plain_template(models.digest),
        distillation=_distillation(study),
        micro_batch_tokens=config.trainer.micro_batch_tokens if adapter.get("dropout", 0) > 0 else None,
        devices=together if adapter.get("dropout", 0) > 0 and together > 1 else None,
        model=models.digest if cut is None else None,
    )
    return study.recipe("tuned", spec, inputs if cut is None else inputs | {"pruned": cut}, study.rows.labels)


def _distillation(study: Study) -> dict[str, Any] | None:
    """What of the losses counts; forward KL, alone or with its share of cross-entropy, has no weights there."""
    weights, finetune, models = study.losses, study.config.finetune, study.models
    if weights in (PLAIN, {}):
        return None
    _check_loss(study)
    spec: dict[str, Any] = {}
    if any(LOSSES[name].needs_teacher for name in weights) and not taught.is_asked(study):
        spec = {"teacher": models.teacher_digest, "dtype": study.config.model.dtype}
    spec |= {key: finetune[key] for name in weights for key in LOSSES[name].settings}
    if MODES[finetune.mode].rollouts and finetune.student_share > 0:
        spec |= {"rollouts": {key: plain(finetune)[key] for key in ROLLOUTS} | rolled.writer(study.config.rollouts)}
    ce_share = weights.get("cross_entropy", 0.0)
    if weights | {"cross_entropy": ce_share} == {"forward_kl": 1 - ce_share, "cross_entropy": ce_share}:
        return spec | {"ce_share": ce_share}
    return spec | {"loss": weights}


def loss_weights(distillation: dict[str, Any]) -> dict[str, float]:
    """The weights of the losses that a recipe names."""
    if "loss" in distillation:
        return {name: float(weight) for name, weight in distillation["loss"].items()}
    ce_share = distillation["ce_share"]
    return {"forward_kl": 1 - ce_share} | ({"cross_entropy": ce_share} if ce_share else {})


def _check_loss(study: Study) -> None:
    """Refuse losses on states that the teacher does not have, or keeps as one with others."""
    weights, models = study.losses, study.models
    states = [name for name in weights if LOSSES[name].needs == "teacher states"]
    if states and models.teacher_digest != models.digest:
        raise UserError(
            f"finetune.loss={states[0]} compares states block by block with the unpruned model's, and teacher.path="
            f"{study.config.teacher.path} is another; leave it out, or choose a loss on logits such as forward_kl"
        )
    if "relations" in states:
        names: set[str] = models.known(lambda: set(models.checkpoint.block_tensors[0]), set())
        if names and not any(name.endswith("q_proj.weight") for name in names):
            raise UserError(
                "finetune.loss=relations compares queries, keys and values, which this model keeps in one matrix; "
                "choose hidden_states"
            )


def _adapter_spec(study: Study) -> dict[str, Any]:
    """What of the adapter's settings counts; LoRA on all blocks is named by its own four."""
    adapter = study.config.adapter
    if adapter.method != "lora":
        return {"method": adapter.method}
    spec = {key: adapter[key] for key in ("rank", "alpha", "dropout")} | {"targets": list(adapter.targets)}
    return spec if adapter.scope == "all" else spec | {"scope": adapter.scope, "blocks": adapter.blocks}


def check_rows(study: Study, num_examples: int) -> None:
    """Refuse a split that the dataset is too small for."""
    finetune = study.config.finetune
    rows = num_examples - study.validation_rows
    if rows < 1:
        raise UserError(
            f"finetune.validation_rows={study.validation_rows} leaves no row to train on; "
            f"the dataset has {num_examples} rows"
        )
    if finetune.num_rows is not None and finetune.num_rows > rows:
        raise UserError(
            f"finetune.num_rows={finetune.num_rows}, but {rows} rows are left beside "
            f"{study.validation_rows} for validation; raise dataset.num_rows"
        )


def check_lengths(study: Study, examples: list[Example]) -> None:
    """Refuse a limit that is below every row; of rows that wait for a rewrite, below every prompt."""
    finetune, system_prompt = study.config.finetune, study.config.dataset.system_prompt
    tokenizer, targets_of = study.models.checkpoint.tokenizer(), MODES[finetune.mode].targets
    shortest = None
    for example in examples:
        by_mode = {} if finetune.same_rows else {"rewrites": "", "gold": example.gold}
        target = by_mode.get(targets_of, example.reference) or ""
        length = len(training_ids(tokenizer, example.prompt, target, system_prompt, example.before)[0])
        if length <= finetune.max_length:
            return
        shortest = length if shortest is None else min(shortest, length)
    bare = targets_of == "rewrites" and not finetune.same_rows
    raise UserError(
        f"finetune.max_length={finetune.max_length} is shorter than every row of the dataset; the shortest has "
        f"{shortest} tokens{' without its answer' if bare else ''}, raise it"
    )


def check_turns(study: Study, examples: list[Example]) -> None:
    """Refuse rows with turns that the chat template of whoever is shown them does not render."""
    first = {tuple(turn["role"] for turn in example.before): example for example in reversed(examples)}
    digests = {study.models.digest, study.models.teacher_digest} if set(first) - {()} else set()
    tokenizers = [Checkpoint(study.sources[digest]).tokenizer() for digest in digests]
    system_prompt = study.config.dataset.system_prompt
    for roles, example in first.items():
        for tokenizer in tokenizers if roles else ():
            try:
                training_ids(tokenizer, example.prompt, example.reference, system_prompt, example.before)
            except RefusalError as error:
                turns = ", ".join([*roles, "user", "assistant"])
                raise UserError(
                    f"dataset: the chat template refuses the row {example.id!r} ({turns}): {error.reason}"
                ) from None


def check_vocabulary(study: Study) -> None:
    """Refuse a teacher whose probabilities are not over the student's own tokens."""
    if study.models.teacher_digest == study.models.digest:
        return
    model, teacher = study.models.checkpoint, Checkpoint(study.sources[study.models.teacher_digest])
    sizes = [checkpoint.config["vocab_size"] for checkpoint in (teacher, model)]
    same = sizes[0] == sizes[1]
    if not same or teacher.tokenizer().get_vocab() != model.tokenizer().get_vocab():
        what = f"{sizes[0]} tokens and the model's {sizes[1]}" if not same else "other tokens than the model's"
        raise UserError(
            f"teacher.path={study.config.teacher.path}: its vocabulary has {what}, and logit distillation compares "
            "token by token; choose a teacher of the same family, or finetune=self_distill"
        )


def _check_adapter(study: Study) -> None:
    adapter, pruning = study.config.adapter, study.config.pruning
    if adapter.method != "lora":
        return
    removed = study.blocks_removed
    if adapter.scope == "beside_cut" and not removed and pruning.ratio is not None:
        raise UserError(
            f"adapter.scope=beside_cut needs removed blocks, but pruning.ratio={pruning.ratio:g} narrows every "
            "block alike; choose adapter=lora, or remove blocks too: pruning.size=2"
        )
    if adapter.scope == "beside_cut" and not removed:
        raise UserError("adapter.scope=beside_cut needs a cut; choose another adapter, or add for example pruning=n2")
    if adapter.scope == "last" and adapter.blocks > study.blocks_left:
        raise UserError(f"adapter.blocks={adapter.blocks} is more than the student's {study.blocks_left} blocks")
    targets = list(adapter.targets)
    if targets == ["all-linear"]:
        return
    names: set[str] = study.models.known(lambda: linear_layers(study.models.checkpoint), set())
    for target in targets:
        if names and not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rsplit(".", 1)[1] for name in names if ".layers." in name})
            raise UserError(
                f"adapter.targets: no linear layer {target}; choose [all-linear] or from {', '.join(known)}"
            )


LESS = ("trainer.micro_batch_tokens", "trainer.gradient_checkpointing")
"""Settings that take memory from it, and leave its result."""
LAST = ("finetune.max_length",)
"""One that leaves longer rows out."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    spec, finetune = Tuned.read(recipe.spec), sizes.config.finetune
    drawn = drawn_rows(sizes, spec)
    rows = finetune.epochs * drawn
    longest = min(sizes.longest, sizes.setting("finetune.max_length"))
    share, target = rolled.writes(sizes), rolled.target(sizes)
    target += share * (rolled.new(sizes, drawn) - target) if share else 0
    length, micro = min(sizes.prompt + target, longest), sizes.setting("trainer.micro_batch_tokens")
    cost_model = sizes.student(PRECISIONS[finetune.precision])
    teacher = _teacher(sizes, spec)
    settings = cost_model, training(sizes), rows, length, finetune.batch_size, micro, teacher
    needed = estimates.tuned(*settings, epochs=1 if rolled.writes(sizes) else finetune.epochs, longest=longest)
    if teacher and "hidden_states" in loss_weights(spec.distillation or {"loss": PLAIN}):
        together = max(longest, min(micro, finetune.batch_size * length))
        states = sizes.kept * together * teacher.width * teacher.shape.hidden
        needed = replace(needed, memory=needed.memory + states)
    return rolled.with_writing(sizes, needed, cost_model, drawn, VALIDATIONS)


def drawn_rows(sizes: Sizes, spec: Tuned) -> int:
    """Rows of an epoch, of which none counts as too long."""
    finetune, left = sizes.config.finetune, max(1, sizes.rows - spec.finetune["validation_rows"])
    drawn = finetune.num_rows or (left if finetune.num_tokens is None else finetune.num_tokens / max(1, sizes.answer))
    return int(max(1, round(min(drawn, left))))


def _teacher(sizes: Sizes, spec: Tuned) -> CostModel | None:
    """Work on the teacher beside a student."""
    if spec.distillation is None or "teacher" not in spec.distillation:
        return None
    shape = sizes.shape_of(spec.distillation["teacher"])
    return CostModel(shape, shape.blocks, BYTES[spec.distillation["dtype"]], sizes.device)


def training(sizes: Sizes) -> Training:
    """What the adapter trains of the student."""
    adapter, recomputed = sizes.config.adapter, sizes.setting("trainer.gradient_checkpointing")
    if adapter.method == "full":
        return Training(sizes.cut.parameters(sizes.kept), whole=True, recomputed=recomputed)
    if adapter.method == "head_and_norms":
        return Training(estimates.head_and_norms_parameters(sizes.cut, sizes.kept), recomputed=recomputed)
    blocks, reach = adapted_blocks(sizes)
    trained = estimates.adapter_parameters(sizes.cut, blocks, adapter.rank, list(adapter.targets))
    return Training(trained, reach, four_bit=adapter.quantisation is not None, recomputed=recomputed)


def adapted_blocks(sizes: Sizes) -> tuple[int, int]:
    """(blocks with LoRA, blocks from the last down to the first of them).

    Where the cut is not known before it is made, it counts as one gap above the first blocks: the most that it
    can take.
    """
    adapter, pruning = sizes.config.adapter, sizes.config.pruning
    if adapter.scope == "all":
        return sizes.kept, sizes.kept
    if adapter.scope == "last":
        return adapter.blocks, adapter.blocks
    removed = pruning.blocks
    if removed is None and pruning.start is not None:
        removed = range(pruning.start, pruning.start + pruning.size)
    if removed is None or sizes.start < sizes.shape.blocks:
        return min(2 * adapter.blocks, sizes.kept), sizes.kept
    kept = [block for block in range(sizes.shape.blocks) if block not in removed]
    places = beside_cut(kept, list(removed), adapter.blocks)
    return len(places), sizes.kept - places[0]


# ---- building -----------------------------------------------------------------------------------------------------


def tokenized(
    tokenizer: Any,
    rows: Iterable[dict[str, Any]],
    system_prompt: str | None,
    max_length: int,
    num_tokens: int | None = None,
    same_rows: bool = False,
    folder: Path | None = None,
) -> tuple[Any, int]:
    """Training rows as token ids (`KeptRows`, in `folder`), and how many were over `max_length`; the first with
    `num_tokens` target tokens. A rejected answer that is too long is none.

    With `same_rows`, those are over the limit whose references are, whatever their targets: a target that alone is too
    long gives way to its reference, so that arms with other targets keep the same rows.
    """
    from sdd.finetuning.module import TrainingRow
    from sdd.finetuning.rows import KeptRows

    def ids_of(row: dict[str, Any], text: str) -> tuple[list[int], int]:
        return training_ids(tokenizer, row["prompt"], text, system_prompt, row.get("before", ()))

    kept = KeptRows(folder=folder)
    too_long, tokens, replaced = 0, 0, 0
    for row in rows:
        ids, prompt_length = ids_of(row, row["target"])
        if same_rows and row["target"] != row["reference"]:
            reference = ids_of(row, row["reference"])
            if len(reference[0]) > max_length or len(ids) > max_length:
                replaced += len(reference[0]) <= max_length
                ids, prompt_length = reference
        if len(ids) > max_length:
            too_long += 1
            continue
        rejected = None
        if row.get("rejected"):
            rejected = ids_of(row, row["rejected"])[0]
            rejected = rejected if len(rejected) <= max_length else None
        tokens += len(ids) - prompt_length
        if num_tokens is not None and tokens > num_tokens:
            return kept, too_long
        kept.append(TrainingRow(ids, prompt_length, rejected, row.get("weight", 1.0), row.get("place")))
    if num_tokens is not None and tokens < num_tokens:
        raise UserError(
            f"finetune.num_tokens={num_tokens}, but the {len(kept)} rows beside the held-out ones have {tokens} target "
            "tokens; lower it, or raise dataset.num_rows"
        )
    if replaced:
        of = len(kept) + too_long
        log.warning("%d of %d targets are over finetune.max_length; their references stand there", replaced, of)
    return kept, too_long


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`adapter/` (or `checkpoint/`, where all is trained), `history.csv`, `learning_curve.png` and `rows.json`.

    With several devices this process waits for those that train, one a device, of which the first writes.
    """
    if shared(build, runtime, recipe, inputs, folder):
        return
    import torch

    from sdd.finetuning.sharded import gather_trained

    spec = Tuned.read(recipe.spec)
    settings = spec.finetune
    base = Checkpoint(inputs["pruned"]) if "pruned" in inputs else runtime.checkpoint(str(spec.model))
    tokenizer = base.tokenizer()
    rows = Lines(inputs["targets"] / "train.jsonl", placed=True)
    domains = draws.domains_of(runtime, recipe.inputs["targets"]) if settings.get("domains") else {}
    drawn, held_out = draws.drawn(settings, spec.seed, rows, inputs.get("damaged"), domains)
    shown, same_rows = (spec.system_prompt, settings["max_length"]), settings.get("same_rows", False)
    scratch = _scratch(folder)
    training, too_long = tokenized(tokenizer, drawn, *shown, settings.get("num_tokens"), same_rows, scratch)
    validation, held_out_too_long = tokenized(tokenizer, held_out, *shown, None, same_rows, scratch)
    if recipe.inputs["targets"].spec.get("rejected"):
        refused = sum(map(bool, training.rejected))
        log.log(logging.INFO if refused else logging.WARNING, "%d training rows have a rejected rewrite", refused)
    if not training and too_long < len(drawn):
        raise UserError(f"finetune.num_tokens={settings['num_tokens']} is less than the first row has; raise it")
    if not training:
        raise UserError(f"finetune.max_length={settings['max_length']} is shorter than every training row")
    drawn = drawn[: len(training) + too_long]
    if settings.get("weights"):
        draws.balance(training)
    if too_long:
        log.warning("%d of %d rows are over finetune.max_length and left out", too_long, len(drawn))
    if held_out_too_long:
        warning = "%d of %d validation rows are over finetune.max_length and left out"
        log.warning(warning, held_out_too_long, len(held_out))
    torch.manual_seed(spec.seed)
    adapter = spec.adapter
    dtype = "float32" if adapter.get("method") == "full" else PRECISIONS[spec.precision]
    device = "cpu" if runtime.is_sharded else runtime.device  # from there each rank takes its part, block by block
    model = base.model(dtype, device, runtime.attention, spec.base_quantisation)
    if not runtime.is_sharded:
        checkpoints.check_logits(model)
    student = adapted(model, adapter, _places(adapter, model, inputs.get("pruned")))
    if runtime.gradient_checkpointing:
        checkpoints.recompute_activations(model)
    loss = _loss(spec, runtime, model, inputs)
    if cache := getattr(loss, "cache", None):
        _check_places(cache, training, validation)
    base_name = f"pruned/{inputs['pruned'].name}" if "pruned" in inputs else f"model/{spec.model}"
    handed = Handover(student, base, base_name, PRECISIONS[spec.precision], scratch)
    history, kept = _fit(student, tokenizer, loss, training, validation, recipe, runtime, scratch, handed)
    if runtime.is_sharded:
        gather_trained(student, keep=ranks.rank() == 0)
    if ranks.rank() > 0:
        return
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
            "target_tokens": sum(training.targets),
            "validation": len(validation),
            "validation_over_max_length": held_out_too_long,
            **({} if kept is None else {"kept_step": kept}),
        },
    )


def _check_places(cache: Any, *parts: Any) -> None:
    """What is kept of the teacher is of these rows' tokens."""
    placed = ((place, tokens) for rows in parts for place, tokens in zip(rows.places, rows.targets, strict=True))
    if any(cache.count(place) != tokens for place, tokens in placed):
        raise UserError(
            "the teacher's probabilities (stage taught) are of other tokens than the student's; its "
            "tokenizer or chat template is another: leave finetune.cached out, or build taught again"
        )


def _loss(spec: Tuned, runtime: Runtime, model: Any, inputs: Mapping[str, Path]) -> Any:
    """Cross-entropy on the targets, or the losses that the recipe names, with a teacher beside the student if need."""
    from sdd.finetuning.module import loss_sum

    if spec.distillation is None:
        return loss_sum
    from sdd.finetuning.losses.cached import Cache
    from sdd.finetuning.losses.weighted import built

    settings, teacher, kept, cache = spec.distillation, None, [], None
    weights = loss_weights(settings)
    if "teacher" in settings:
        checkpoint = runtime.checkpoint(settings["teacher"], "teacher")
        device = "cpu" if runtime.is_sharded else runtime.device
        teacher = checkpoint.model(settings["dtype"], device, runtime.attention).requires_grad_(False)
        if not runtime.is_sharded:
            checkpoints.check_logits(teacher)
    if any(LOSSES[name].needs == "teacher states" for name in weights):
        kept = _kept(model, inputs.get("pruned"))
    if "taught" in inputs:
        cache = Cache(inputs["taught"])
    return built(weights, settings, teacher, kept, cache)


def _kept(model: Any, pruned: Path | None) -> list[int]:
    """The unpruned model's block that each block of the student was."""
    if pruned is None:
        return list(range(len(checkpoints.blocks(model))))
    return list(read_facts(pruned / "pruning.json", {"kept_blocks": [int]})["kept_blocks"])


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


def _scratch(folder: Path) -> Path:
    """The folder of what is there while it is tuned, and of no link's; a folder may have come from elsewhere."""
    scratch = folder / SCRATCH
    if scratch.is_symlink():
        scratch.unlink()
    scratch.mkdir(exist_ok=True)
    return scratch


def _checkpoint(scratch: Path, module: Any) -> tuple[Path | None, dict[str, Any] | None]:
    """The latest checkpoint of the module's own run in its scratch folder, and what it holds; all else is removed.

    A folder may have come from elsewhere. To begin anew costs time, and ends with the same bytes.
    """
    from sdd.finetuning.module import read_checkpoint

    first = ranks.rank() == 0  # the others look at the same files, and leave them alone
    kept: tuple[Path | None, dict[str, Any] | None] = None, None
    for path in sorted(scratch.iterdir(), key=lambda path: path.lstat().st_mtime, reverse=True):
        if kept[1] is None and path.suffix == ".ckpt":
            if (checkpoint := read_checkpoint(path, module)) is not None:
                kept = path, checkpoint
                continue
            if not first:
                continue
            log.warning("%r in %s is no checkpoint of this run, or damaged; it is removed", path.name, scratch)
        if not first:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return kept


def _fit(
    student: Any,
    tokenizer: Any,
    loss: Any,
    training: Sequence[Any],
    validation: Sequence[Any],
    recipe: Recipe,
    runtime: Runtime,
    scratch: Path,
    handed: Handover | None = None,
) -> tuple[list[dict[str, Any]], int | None]:
    """The history, and the step whose student is kept where that is the best; `handed` is for a server that writes."""
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint
    from pytorch_lightning.plugins.environments import LightningEnvironment
    from pytorch_lightning.utilities.exceptions import SIGTERMException

    from sdd.finetuning.module import Optimisation, StudentModule, WholeCheckpoints, staying, step_rows
    from sdd.finetuning.sharded import Sharded, Shards

    spec = Tuned.read(recipe.spec)
    settings, seed = spec.finetune, spec.seed
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
    shown = {"desc": "tune", "unit": "step", "disable": ranks.rank() > 0}
    models = [student] if getattr(loss, "teacher", None) is None else [student, loss.teacher]
    strategy = Sharded(runtime.ranks) if runtime.is_sharded else staying(student, runtime.ranks)
    with tqdm(total=len(plan), **shown) as progress, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning")

        def on_step(step: int, logged: dict[str, float]) -> None:
            progress.n = step - 1
            progress.update(1)
            rates = {name.removesuffix("_rate"): f"{rate:.0f}tok/s" for name, rate in module.rates.items()}
            progress.set_postfix(loss=f"{logged['loss']:.4f}", **rates, refresh=False)

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
            scratch=None if getattr(loss, "needs_whole_passes", False) else scratch,
            rollouts=rolled.rollouts_of(
                (spec.distillation or {}).get("rollouts"),
                seed,
                tokenizer,
                causal_lm(student),
                training,
                validation,
                plan,
                settings["max_length"],
                handed,
                runtime,
            ),
            keep_best=settings.get("keep") == "best",
            halves=spec.micro_batch_tokens is None and not runtime.is_sharded,
            shards=Shards(*models) if runtime.is_sharded else None,
        )
        saved, resumed = _checkpoint(scratch, module)
        keeping = ModelCheckpoint(scratch, "{step}", every_n_train_steps=runtime.checkpoint_every, save_top_k=1)
        trainer = pl.Trainer(
            accelerator=runtime.accelerator,
            devices=runtime.devices,
            num_nodes=runtime.num_nodes,
            strategy=strategy,
            use_distributed_sampler=False,  # every rank goes through all steps
            precision={"32": "32-true", "bf16": "bf16-mixed"}[spec.precision],  # type: ignore[arg-type]
            max_steps=len(plan),
            max_epochs=-1,
            log_every_n_steps=1,
            logger=_logger(recipe, runtime) if ranks.rank() == 0 else False,
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
        except SIGTERMException:  # Lightning's own way out would be exit code 0
            raise SystemExit(128 + signal.SIGTERM) from None
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if saved is None or module.began:
                raise
            saved.unlink()
            raise UserError(
                f"{saved}: training cannot go on from it ({type(error).__name__}); it is removed, run the same again"
            ) from None
    _finish_logger(trainer.logger)
    assert len(module.history) == len(plan), f"{len(module.history)} steps recorded of {len(plan)}"
    return module.history, module.take_best()


def _logger(recipe: Recipe, runtime: Runtime) -> Any:
    """The configured tracker with the artifact's address as its run id; False (history.csv only) by default."""
    if "_target_" not in runtime.logger:
        return False
    runtime.run_folder.mkdir(parents=True, exist_ok=True)
    mode = recipe.inputs["targets"].spec["mode"]
    name = f"{mode}-{recipe.labels.get('dataset', '')}-{recipe.spec['seed']}"
    config = {"stage": recipe.stage, "address": recipe.address, "spec": recipe.spec}
    folder = str(runtime.run_folder)
    if runtime.logger["_target_"] == TENSORBOARD:
        tracker = build_part(runtime.logger, save_dir=folder, name="tensorboard", version=recipe.address)
        tracker.experiment.add_text(
            "recipe", f"    {json.dumps({'name': name, **config}, indent=1)}".replace("\n", "\n    ")
        )
        return tracker
    return build_part(runtime.logger, id=recipe.address, name=name, save_dir=folder, config=config)


def _finish_logger(logger: Any) -> None:
    if logger is not None and hasattr(logger, "experiment") and hasattr(logger.experiment, "finish"):
        logger.experiment.finish()
