"""Stage `rewrites`: the teacher's own answers to the rows of a dataset, guided by the reference answers, by none, or by
the answers of the pruned model."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.config.allowed import build as build_part
from sdd.config.parts import TARGETS, class_of
from sdd.data import Example
from sdd.data.mixture import part_of
from sdd.errors import UserError
from sdd.finetuning.modes import REQUESTS
from sdd.forward import ranks
from sdd.models.chats import rewrite_prompt
from sdd.planning import estimates
from sdd.planning.cost_model import BYTES, CostModel
from sdd.planning.estimates import Estimate
from sdd.planning.price import Rewritten
from sdd.rewriting.engines import Answering, Engine, HFEngine, chunk_rows
from sdd.rewriting.journal import Journal
from sdd.rewriting.selection import Selection, rewrite_rows
from sdd.stages import answered, pruned
from sdd.stages.datasets import for_row, is_chunk, read_examples, selection_for
from sdd.stages.runtime import Runtime
from sdd.stages.sharing import shared
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.store import SCRATCH, Recipe
from sdd.store.files import Lines, read_jsonl, write_jsonl
from sdd.study import Study
from sdd.untrusted import printable


@dataclass(frozen=True)
class Rewrites(Spec):
    """`selection` is there where several tries are sampled, of which the first good one is kept; `all_tries` where all
    are, for the targets to choose among. With the input `answers`, those stand in for the references that the template
    shows."""

    teacher: str
    dtype: str
    dataset: dict[str, Any]
    template: Any
    system_prompt: str | None
    engine: dict[str, Any]
    chat_template: str | None = None
    selection: dict[str, Any] | None = None
    all_tries: bool = False


def recipe(study: Study) -> Recipe:
    """The version rises by 1 where the teacher's checkpoint ships settings that steer generation, which were once
    obeyed; by 2 where rewrites are sampled, whose noise was once drawn from another generator; by 4 where one of
    several tries is kept by its final answer, which was once read otherwise."""
    config, models, rows = study.config, study.models, study.rows
    engine, request = build_part(config.engine), REQUESTS[config.finetune.request]
    all_tries = config.finetune.choice != "first"
    picked = engine.tries > 1 and not all_tries
    spec = Rewrites(
        teacher=models.teacher_digest,
        dtype=config.model.dtype,
        dataset=rows.spec,
        template=rows.setting("template") if request is None else request.template,
        system_prompt=config.dataset.system_prompt,
        engine=engine.spec(),
        chat_template=models.plain_template(models.teacher_digest),
        selection=selection_of(study) if picked else None,
        all_tries=all_tries,
    )
    raised = models.steers(models.teacher_digest) + 2 * (config.engine.get("temperature", 0) > 0)
    raised += 4 * (picked and rows.judged_anew)
    corrects = request is not None and request.corrects
    inputs = {"answers": answered.drafts(study, pruned.recipe(study))} if corrects else {}
    return study.recipe("rewrites", spec, inputs, rows.labels, raised)


def selection_of(study: Study) -> dict[str, Any]:
    """How rewrites are judged: by the dataset's rule, and by none where the teacher is shown no reference."""
    request = REQUESTS[study.config.finetune.request]
    if request is None:
        return study.rows.selection
    return {"rule": "none", "leak_phrases": list(request.leak_phrases)}


LESS = ("engine.batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    engine, asked = sizes.config.engine, expected(sizes, recipe)
    batch = sizes.setting("engine.batch_size") or sizes.setting("trainer.inference_batch_size")
    longest = min(2 * sizes.answer, engine.get("max_new_tokens") or inf)
    shape = sizes.shape_of(recipe.spec["teacher"])
    cost_model = CostModel(shape, shape.blocks, BYTES[sizes.config.model.dtype], sizes.device)
    needed = estimates.rewrites(cost_model, sizes.rows, asked.asked, asked.new, longest, batch, chunk_rows(batch))
    needed = replace(needed, seconds=needed.seconds * (engine.get("tries") or 1))
    return needed if issubclass(_engine(recipe.spec["engine"]["kind"]), HFEngine) else estimates.elsewhere(needed)


def expected(sizes: Sizes, recipe: Recipe) -> Rewritten:
    """Answers as long as the teacher's own words are, up to the limit; the first try is good where one is kept."""
    engine, template = sizes.config.engine, recipe.spec["template"]
    if isinstance(template, dict):
        template = sizes.config.dataset.template
    new = min(sizes.written, engine.get("max_new_tokens") or inf)
    drafted = new if "answers" in recipe.inputs else 0.0
    asked = sizes.prompt + sizes.tokens(rewrite_prompt(template, "", ""))
    if "{reference}" in template:
        asked += drafted or sizes.answer
    return Rewritten(engine.get("tries") or 1 if recipe.spec.get("all_tries") else 1, asked, new, drafted)


def _engine(kind: str) -> type[Engine]:
    """The engine that has this kind in a key."""
    for id in sorted(TARGETS["engine",]):
        engine: type[Engine] = class_of(id)
        if engine.kind == kind:
            return engine
    raise UserError(f"the recipe names an engine {printable(kind)}, which is not one of this project's")


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`rewrites.jsonl`; finished chunks of rows of similar length survive a kill, and every answer of a server."""
    spec = Rewrites.read(recipe.spec)
    rows = read_examples(runtime, spec.dataset)
    examples = rows
    if "answers" in inputs:
        said = {row["id"]: row["text"] for row in read_jsonl(inputs["answers"] / "answers.jsonl")}
        examples = [replace(row, reference=said[row.id]) for row in rows]
    settings = {key: value for key, value in spec.engine.items() if key != "kind"}
    engine = _engine(spec.engine["kind"])(**settings)
    if engine.kind == HFEngine.kind and shared(build, runtime, recipe, inputs, folder):
        return
    templates = [for_row(spec.template, example.id) for example in examples]
    order = sorted(
        range(len(examples)),
        key=lambda i: (-len(rewrite_prompt(templates[i], examples[i].prompt, examples[i].reference)), i),
    )
    chunks, size = [], chunk_rows(runtime.place.at_once * ranks.number())
    for part in spec.dataset.get("parts", [None]):  # rows of one chunk share a template and a selection
        own = [i for i in order if part is None or part_of(examples[i].id) == part]
        chunks += [own[at : at + size] for at in range(0, len(own), size)]
    scratch = folder / SCRATCH
    scratch.mkdir(exist_ok=True)
    opened = False
    with tqdm(total=len(examples), desc="rewrites", unit="row") as progress:
        for number, chunk in enumerate(chunks):
            path, chosen = scratch / f"{number:06d}.jsonl", [examples[i] for i in chunk]
            if not is_chunk(path, [example.id for example in chosen]):
                if not opened:
                    teacher = runtime.checkpoint(spec.teacher, "teacher")
                    engine.open(teacher, spec.dtype, spec.system_prompt, runtime.place)
                    opened = True
                selection = selection_for(**spec.selection, id=chosen[0].id) if spec.selection else Selection()
                judged = None if spec.all_tries else selection
                kept = scratch / f"{number:06d}.answers.jsonl"
                answering: Answering = Journal(engine, kept) if engine.asks_alone else engine
                rewritten = list(rewrite_rows(answering, chosen, templates[chunk[0]], judged))
                if ranks.rank() == 0:
                    write_jsonl(path, rewritten)
            else:
                progress.initial += len(chunk)
            progress.update(len(chunk))
    if ranks.rank() == 0:
        _in_order(chunks, rows, scratch, folder / "rewrites.jsonl")


def _in_order(chunks: list[list[int]], rows: list[Example], scratch: Path, path: Path) -> None:
    """Write what all chunks hold in the dataset's order and with its references, and never hold all of it."""
    lines = Lines(*(scratch / f"{number:06d}.jsonl" for number in range(len(chunks))))
    at = array("q", bytes(8 * len(lines)))
    for line, place in enumerate(place for chunk in chunks for place in chunk):
        at[place] = line
    made = zip(lines.at(at), rows, strict=True)
    write_jsonl(path, (line | {"reference": row.reference} for line, row in made))
