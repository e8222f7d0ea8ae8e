"""Stage `answered`: a model's own greedy answers to held-out prompts, which several analyses share, or to all prompts
that students are trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.config.allowed import build as build_part
from sdd.data.draws import split_rows
from sdd.errors import UserError
from sdd.forward import ranks
from sdd.forward.teacher_forcing import Row
from sdd.models import checkpoints
from sdd.models.chats import chat_prompt_ids, task_text
from sdd.planning import estimates
from sdd.planning.estimates import Estimate
from sdd.rewriting.engines import HFEngine, Request, chunk_rows
from sdd.stages.datasets import is_chunk, read_examples
from sdd.stages.runtime import Runtime
from sdd.stages.sharing import shared
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.stages.student import open_student, trained_prompts
from sdd.store import SCRATCH, Recipe
from sdd.store.files import read_jsonl, write_jsonl
from sdd.study import Study


@dataclass(frozen=True)
class Answered(Spec):
    """`model` where the unpruned model answers, else the input `model`. `held_out`: 0 is every row."""

    dataset: dict[str, Any]
    held_out: int
    system_prompt: str | None
    dtype: str
    max_new_tokens: int
    max_prompt_tokens: int
    chat_template: str | None = None
    model: str | None = None


def recipe(study: Study, student: Recipe | None) -> Recipe:
    """The answers of a student, or of the unpruned model (None)."""
    config, models = study.config, study.models
    if (rows := study.prompts.source.known_rows()) is not None:
        check_held_out(study, rows)
    spec = Answered(
        dataset=study.prompts.spec,
        held_out=_held_out(study),
        system_prompt=config.dataset.system_prompt,
        dtype=models.dtype("analysis"),
        max_new_tokens=config.analysis.max_new_tokens,
        max_prompt_tokens=config.engine.get("max_prompt_tokens", 1024),
        chat_template=models.plain_template(models.digest),
        model=models.digest if student is None else None,
    )
    inputs = {} if student is None else {"model": student}
    return study.recipe("answered", spec, inputs, study.prompts.labels, study.raised_for(student, spec.dtype))


def drafts(study: Study, student: Recipe | None) -> Recipe:
    """The answers of a student, or of the unpruned model (None), to all rows, within the limits of rewrites."""
    config, models, rows = study.config, study.models, study.rows
    engine = build_part(config.engine)
    spec = Answered(
        dataset=rows.spec,
        held_out=0,
        system_prompt=config.dataset.system_prompt,
        dtype=config.model.dtype,
        max_new_tokens=engine.max_new_tokens,
        max_prompt_tokens=engine.max_prompt_tokens,
        chat_template=models.plain_template(models.digest),
        model=models.digest if student is None else None,
    )
    inputs = {} if student is None else {"model": student}
    return study.recipe("answered", spec, inputs, rows.labels, study.raised_for(student, spec.dtype))


def _held_out(study: Study) -> int:
    """How many prompts: those that no student is trained on, or as many as are asked for."""
    asked = study.config.analysis.num_prompts
    return int(study.validation_rows if asked is None else asked)


def check_held_out(study: Study, num_examples: int) -> None:
    """Refuse prompts that are not there, or not held out."""
    held_out, validation = _held_out(study), study.validation_rows
    if held_out < 1:
        raise UserError("finetune.validation_rows=0 holds no prompt out; raise it, or set analysis.prompts")
    if held_out > num_examples:
        raise UserError(f"analysis.num_prompts={held_out}, but the dataset has {num_examples} rows; ask for fewer")
    if study.config.analysis.prompts is None and held_out > validation:
        raise UserError(
            f"analysis.num_prompts={held_out}, but finetune.validation_rows={validation} are held out; "
            "ask for fewer, or hold out more"
        )


LESS = ("trainer.inference_batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    spec = Answered.read(recipe.spec)
    cost_model = sizes.cost_model(sizes.kept if recipe.inputs else sizes.shape.blocks, spec.dtype)
    batch = sizes.setting("trainer.inference_batch_size")
    limits, rows = (spec.max_new_tokens, spec.max_new_tokens), spec.held_out or sizes.rows
    return estimates.rewrites(cost_model, rows, sizes.prompt, *limits, batch, chunk_rows(batch))


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`answers.jsonl`: {"id", "prompt", "text", "finish", "tokens"} a held-out row; finished chunks survive a kill."""
    if shared(build, runtime, recipe, inputs, folder):
        return
    spec = Answered.read(recipe.spec)
    rows = read_examples(runtime, spec.dataset)
    if spec.held_out:
        rows = split_rows(rows, spec.held_out, 0, seed=0)[1]
    engine = HFEngine(max_new_tokens=spec.max_new_tokens, max_prompt_tokens=spec.max_prompt_tokens)
    scratch = folder / SCRATCH
    scratch.mkdir(exist_ok=True)
    opened, size = False, chunk_rows(runtime.inference_batch_size * ranks.number())
    paths = []
    for start in tqdm(range(0, len(rows), size), desc="answers", unit="chunk"):
        chunk = rows[start : start + size]
        paths.append(scratch / f"{start:06d}.jsonl")
        if is_chunk(paths[-1], [row.id for row in chunk]):
            continue
        if not opened:
            source = inputs["model"] if "model" in inputs else runtime.source(str(spec.model), "model")
            model, base = open_student(source, runtime, spec.dtype)
            engine.take(model, base.tokenizer(), spec.system_prompt, runtime.inference_batch_size)
            opened = True
        requests = [Request(row.id, row.prompt, before=row.before) for row in chunk]
        answers = {one.id: one for one in engine.complete(requests)}
        if ranks.rank() > 0:
            continue
        write_jsonl(
            paths[-1],
            (
                {
                    "id": row.id,
                    "prompt": row.prompt,
                    **row.turns,
                    "text": answers[row.id].text,
                    "finish": answers[row.id].finish,
                    "tokens": list(answers[row.id].tokens),
                }
                for row in chunk
            ),
        )
    if ranks.rank() > 0:
        return
    write_jsonl(folder / "answers.jsonl", (row for path in paths for row in read_jsonl(path)))


@dataclass(frozen=True)
class Shown:
    """The unpruned model's answers to prompts that the student was not trained on, and both models to show them to.

    `rows` are the token ids of the prompts, as they were asked, and of the answers.
    """

    answers: list[dict[str, Any]]
    rows: list[Row]
    teacher: Any
    student: Any
    tokenizer: Any


def shown(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path]) -> Shown:
    """What a recipe with the inputs `model`, the student, and `answers` shows; both models in the recipe's dtype."""
    asked, dtype = Answered.read(recipe.inputs["answers"].spec), recipe.spec["dtype"]
    left_out = trained_prompts(inputs["model"])
    given = read_jsonl(inputs["answers"] / "answers.jsonl")
    said = (row for row in given if row["tokens"])
    answers = [row for row in said if task_text(row["prompt"], row.get("before", ())) not in left_out]
    if not answers:
        raise UserError("analysis: the student was trained on every prompt; choose others with analysis.prompts")
    teacher = runtime.checkpoint(str(asked.model)).model(dtype, runtime.placed, runtime.attention)
    student, base = open_student(inputs["model"], runtime, dtype)
    for model in (teacher, student):
        checkpoints.check_logits(model)
    tokenizer = base.tokenizer()
    prompts = ((row["prompt"], asked.system_prompt, row.get("before", ())) for row in answers)
    rows = [(chat_prompt_ids(tokenizer, *words), row["tokens"]) for words, row in zip(prompts, answers, strict=True)]
    return Shown(answers, rows, teacher, student, tokenizer)
