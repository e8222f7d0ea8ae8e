"""Stage `answered`: a model's own greedy answers to held-out prompts, which several analyses share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd import models
from sdd.engines import HFEngine, Request
from sdd.forcing import Row
from sdd.prompts import chat_prompt_ids
from sdd.stages.rows import CHUNK_ROWS, read_examples
from sdd.stages.runtime import Runtime, read_jsonl, write_jsonl
from sdd.stages.student import checkpoint_of, open_student
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
            engine.take(model, models.load_tokenizer(base), spec["system_prompt"], runtime.inference_batch_size)
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


def read_answers(folder: Path, left_out: set[str]) -> list[dict[str, Any]]:
    """The answers in an artifact that were asked for and are not to prompts left out."""
    answers = read_jsonl(folder / "answers.jsonl")
    return [row for row in answers if row["tokens"] and row["prompt"] not in left_out]


def answer_rows(tokenizer: Any, answers: list[dict[str, Any]], system_prompt: str | None) -> list[Row]:
    """Token ids of the prompts as they were asked and of the answers."""
    return [(chat_prompt_ids(tokenizer, row["prompt"], system_prompt), row["tokens"]) for row in answers]


def open_both(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], teacher: str) -> tuple[Any, Any, Any]:
    """(the unpruned model, the student, their tokenizer) in the dtype of the recipe."""
    dtype = recipe.spec["dtype"]
    source = runtime.source(teacher, "model")
    whole = models.load_model(source, dtype, runtime.device, runtime.attention)
    student, _ = open_student(inputs["model"], runtime, dtype)
    for model in (whole, student):
        models.check_logits(model)
    return whole, student, models.load_tokenizer(checkpoint_of(inputs["model"], runtime))
