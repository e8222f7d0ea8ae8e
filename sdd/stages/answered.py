"""Stage `answered`: a model's own greedy answers to held-out prompts, which several analyses share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.errors import UserError
from sdd.forward.teacher_forcing import Row
from sdd.models import checkpoints
from sdd.models.chats import chat_prompt_ids
from sdd.rewriting.engines import HFEngine, Request
from sdd.stages.rows import CHUNK_ROWS, read_examples
from sdd.stages.runtime import Runtime, read_jsonl, write_jsonl
from sdd.stages.student import open_student, trained_prompts
from sdd.stages.tuned import split_rows
from sdd.store import SCRATCH, Recipe


def build_answered(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`answers.jsonl`: {"id", "prompt", "text", "finish", "tokens"} a held-out row; finished chunks survive a kill."""
    spec = recipe.spec
    rows = split_rows(read_examples(runtime, spec["dataset"]), spec["held_out"], 0, seed=0)[1]
    engine = HFEngine(max_new_tokens=spec["max_new_tokens"], max_prompt_tokens=spec["max_prompt_tokens"])
    scratch = folder / SCRATCH
    scratch.mkdir(exist_ok=True)
    opened = False
    paths = []
    for start in tqdm(range(0, len(rows), CHUNK_ROWS), desc="answers", unit="chunk"):
        chunk = rows[start : start + CHUNK_ROWS]
        paths.append(scratch / f"{start:06d}.jsonl")
        if paths[-1].is_file():
            continue
        if not opened:
            source = inputs["model"] if "model" in inputs else runtime.source(spec["model"], "model")
            model, base = open_student(source, runtime, spec["dtype"])
            engine.take(model, checkpoints.load_tokenizer(base), spec["system_prompt"], runtime.inference_batch_size)
            opened = True
        said = {one.id: one for one in engine.complete([Request(row.id, row.prompt) for row in chunk])}
        write_jsonl(
            paths[-1],
            (
                {
                    "id": row.id,
                    "prompt": row.prompt,
                    "text": said[row.id].text,
                    "finish": said[row.id].finish,
                    "tokens": list(said[row.id].tokens),
                }
                for row in chunk
            ),
        )
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
    asked, dtype = recipe.inputs["answers"].spec, recipe.spec["dtype"]
    left_out = trained_prompts(inputs["model"])
    given = read_jsonl(inputs["answers"] / "answers.jsonl")
    answers = [row for row in given if row["tokens"] and row["prompt"] not in left_out]
    if not answers:
        raise UserError("analysis: the student was trained on every prompt; choose others with analysis.prompts")
    source = runtime.source(asked["model"], "model")
    teacher = checkpoints.load_model(source, dtype, runtime.device, runtime.attention)
    student, base = open_student(inputs["model"], runtime, dtype)
    for model in (teacher, student):
        checkpoints.check_logits(model)
    tokenizer = checkpoints.load_tokenizer(base)
    rows = [(chat_prompt_ids(tokenizer, row["prompt"], asked["system_prompt"]), row["tokens"]) for row in answers]
    return Shown(answers, rows, teacher, student, tokenizer)
