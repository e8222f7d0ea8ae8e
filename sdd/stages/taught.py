"""Stage `taught`: what the teacher says of every next token of the targets; all cuts, adapters and seeds share it.

One pass of the teacher over the targets, and in training no teacher is loaded.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.finetuning.losses import LOSSES, bytes_a_token
from sdd.models import checkpoints
from sdd.models.chats import training_ids
from sdd.planning import estimates
from sdd.planning.cost_model import BYTES, CostModel
from sdd.planning.estimates import Estimate
from sdd.stages import targets
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.store import SCRATCH, Recipe
from sdd.store.files import Lines
from sdd.study import Study


@dataclass(frozen=True)
class Taught(Spec):
    """`k` tokens of every distribution at `temperature`: the likeliest (`top_k`), their probabilities in `bits` bits,
    or drawn ones (`sampled`)."""

    model: str
    dtype: str
    system_prompt: str | None
    max_length: int
    kind: str
    k: int
    bits: int = 16
    temperature: float = 1.0
    chat_template: str | None = None


def is_asked(study: Study) -> bool:
    """Whether students learn from kept probabilities."""
    cached = study.config.finetune.cached is not None
    return cached and any(LOSSES[name].needs == "teacher logits" for name in study.losses)


def recipe(study: Study) -> Recipe:
    config, models = study.config, study.models
    finetune, names = config.finetune, study.losses
    is_soft = any("temperature" in LOSSES[name].settings for name in names)
    is_drawn = finetune.cached == "sampled"
    vocabulary = int(models.sizes["vocab_size"])
    spec = Taught(
        model=models.teacher_digest,
        dtype=config.model.dtype,
        system_prompt=config.dataset.system_prompt,
        max_length=finetune.max_length,
        kind=finetune.cached,
        k=finetune.cached_k if is_drawn else min(finetune.cached_k, vocabulary),
        bits=Taught.bits if is_drawn else finetune.cached_bits,
        temperature=float(finetune.temperature) if is_soft else 1.0,
        chat_template=models.plain_template(models.digest),
    )
    return study.recipe("taught", spec, {"targets": targets.recipe(study)}, study.rows.labels)


LESS = ("trainer.inference_batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    spec, batch = Taught.read(recipe.spec), sizes.setting("trainer.inference_batch_size")
    shape = sizes.shape_of(spec.model)
    cost_model = CostModel(shape, shape.blocks, BYTES[spec.dtype], sizes.device)
    length = min(sizes.prompt + sizes.answer, spec.max_length)
    disk = sizes.rows * sizes.answer * bytes_a_token(spec.kind, spec.k, spec.bits, shape.vocabulary)
    return estimates.taught(cost_model, sizes.rows, length, batch, disk)


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """Shards of rows in the order of the targets (see `sdd.finetuning.losses.cached`); finished ones survive a kill."""
    import os

    from safetensors.numpy import save_file

    from sdd.finetuning.losses.cached import ROWS, shard

    spec = Taught.read(recipe.spec)
    source = runtime.checkpoint(spec.model, "teacher")
    tokenizer, vocabulary = source.tokenizer(), int(source.config["vocab_size"])
    rows = Lines(inputs["targets"] / "train.jsonl")
    scratch, model = folder / SCRATCH, None
    scratch.mkdir(exist_ok=True)
    (scratch / "begun").touch()
    with tqdm(total=len(rows), desc="taught", unit="row") as progress:
        for number in range(-(-len(rows) // ROWS)):
            chosen = list(rows[number * ROWS : (number + 1) * ROWS])
            shown = [
                training_ids(tokenizer, row["prompt"], row["target"], spec.system_prompt, row.get("before", ()))
                for row in chosen
            ]
            answers = [(ids[:prompt], ids[prompt:] if len(ids) <= spec.max_length else []) for ids, prompt in shown]
            if not _is_whole(folder / shard(number), [len(answer) for _, answer in answers]):
                if model is None:
                    model = source.model(spec.dtype, runtime.placed, runtime.attention)
                    checkpoints.check_logits(model)
                tensors = _said(model, spec, [str(row["id"]) for row in chosen], answers, vocabulary, runtime)
                save_file(tensors, scratch / shard(number))
                os.replace(scratch / shard(number), folder / shard(number))
            progress.update(len(chosen))


def _starts(lengths: Sequence[int]) -> Any:
    import numpy as np

    return np.cumsum([0, *lengths], dtype=np.int64)


def _is_whole(path: Path, lengths: Sequence[int]) -> bool:
    """Whether a shard is there and of these rows; a damaged or a foreign one is made again."""
    from safetensors import SafetensorError, safe_open

    if path.is_symlink() or not path.is_file():
        return False
    try:
        with safe_open(path, framework="np") as opened:
            return bool((opened.get_tensor("starts") == _starts(lengths)).all())
    except (SafetensorError, ValueError, AttributeError):
        return False


def _said(
    model: Any, spec: Taught, ids: list[str], answers: list[tuple[list[int], list[int]]], vocabulary: int, runtime: Any
) -> dict[str, Any]:
    """The tensors of one shard. What is drawn for a row depends on its id alone, not on what is passed with it."""
    import numpy as np
    import torch

    from sdd.finetuning.losses.cached import FORMS, coded, drawn, likeliest
    from sdd.forward.teacher_forcing import CHUNK, answer_states

    starts = _starts([len(answer) for _, answer in answers])
    is_drawn, total = spec.kind == "sampled", int(starts[-1])
    tokens = np.zeros((total, spec.k), dtype=np.uint16 if vocabulary <= 1 << 16 else np.uint32)
    classes = spec.k if spec.k == vocabulary else spec.k + 1
    beside = np.zeros(total, np.float32) if is_drawn else np.zeros((total, classes), FORMS[spec.bits])
    kept = [at for at, (_, answer) in enumerate(answers) if answer]
    for index, states in answer_states(model, [answers[at] for at in kept], runtime.inference_batch_size):
        at = kept[index]
        seed = int.from_bytes(hashlib.sha256(f"taught {ids[at]}".encode()).digest()[:16])
        uniform = np.random.Generator(np.random.Philox(key=seed)).random((len(states), spec.k)) if is_drawn else None
        for first in range(0, len(states), CHUNK):
            place = slice(int(starts[at]) + first, int(starts[at]) + min(first + CHUNK, len(states)))
            with torch.no_grad():
                logits = checkpoints.head_logits(model, states[first : first + CHUNK])
                if uniform is not None:
                    numbers = torch.from_numpy(uniform[first : first + CHUNK]).to(logits.device)
                    chosen, entropy = drawn(logits, numbers, spec.temperature)
                    beside[place] = entropy.float().cpu().numpy()
                else:
                    chosen, nats = likeliest(logits, spec.k, spec.temperature)
                    beside[place] = coded(nats, spec.bits)
            tokens[place] = chosen.cpu().numpy()
    return {"starts": starts, "tokens": tokens, "entropy" if is_drawn else "nats": beside}
