"""Stage `evaluated`: every task of a suite on one model; a killed evaluation keeps its finished tasks."""

import dataclasses
import logging
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd import models
from sdd.errors import UserError
from sdd.evaluation.tiny import suite_tasks
from sdd.stages.runtime import Runtime, read_jsonl, write_json, write_jsonl
from sdd.stages.student import open_student
from sdd.store import SCRATCH, Recipe, digest_of

log = logging.getLogger(__name__)


def build_evaluated(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`samples/<task>.jsonl` and `results.json`, every value of which can be recomputed from the samples."""
    from sdd.evaluation.harness import Harness, summary

    spec = recipe.spec
    tasks = suite_tasks(spec["suite"], list(spec["tasks"]), spec["split"], spec["seed"], spec["limit"])
    for name, task in tasks.items():
        if digest_of(dataclasses.asdict(task)) != spec["tasks"][name]:
            raise UserError(f"task {name} differs from the one that this recipe names; use the version that made it")
    scratch = folder / SCRATCH
    scratch.mkdir(exist_ok=True)
    harness = None
    for task in tqdm(tasks.values(), desc="evaluate", unit="task"):
        path = scratch / f"{task.name}.jsonl"
        if path.is_file():
            continue
        if harness is None:
            source = inputs["model"] if "model" in inputs else runtime.source(spec["model"], "model")
            model, tokenizer_folder = open_student(source, runtime, spec["dtype"])
            tokenizer = models.load_tokenizer(tokenizer_folder)
            batch_size, length = runtime.evaluation_batch_size, spec["max_new_tokens"]
            harness = Harness(model, tokenizer, batch_size, length, spec["system_prompt"])
        write_jsonl(path, harness.run(task))
    (folder / "samples").mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    for task in tasks.values():
        records = list(read_jsonl(scratch / f"{task.name}.jsonl"))
        write_jsonl(folder / "samples" / f"{task.name}.jsonl", records)
        results[task.name] = summary(task.kind, records)
    apart = {name: result for name, result in results.items() if tasks[name].kind == "likelihood"}
    scored = {name: result for name, result in results.items() if name not in apart}
    upstream = recipe.inputs.get("model")
    write_json(
        folder / "results.json",
        {
            "model": {"kind": upstream.stage, "address": upstream.address}
            if upstream
            else {"kind": "teacher", "digest": spec["model"]},
            "tasks": scored,
            "average": statistics.fmean(result["value"] for result in scored.values()) if scored else None,
            "likelihood": apart,
        },
    )
