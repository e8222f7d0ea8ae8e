"""Stage `evaluated`: every task of a suite on one model; a killed evaluation keeps its finished tasks.

The embedded suite and lm-eval's tasks go the same way: what was asked, one task at a time, then the results from what
every task left.
"""

import dataclasses
import logging
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.errors import UserError
from sdd.evaluation.benchmark import Benchmark, Outcome
from sdd.evaluation.tiny import suite_tasks
from sdd.models import checkpoints
from sdd.stages.runtime import Runtime, read_jsonl, write_json, write_jsonl
from sdd.stages.student import open_student
from sdd.store import SCRATCH, Recipe, digest_of

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def build_evaluated(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`samples/<task>.jsonl` and `results.json`, every value of which can be recomputed from the samples."""
    scratch = folder / SCRATCH
    scratch.mkdir(exist_ok=True)
    plan = _embedded if recipe.spec["suite"] == "tiny" else _stock
    results, records = plan(runtime, recipe, inputs, scratch)
    (folder / "samples").mkdir(exist_ok=True)
    for name, rows in records.items():
        write_jsonl(folder / "samples" / f"{name}.jsonl", rows)
    upstream = recipe.inputs.get("model")
    scored = results["tasks"]
    write_json(
        folder / "results.json",
        {
            "model": {"kind": upstream.stage, "address": upstream.address}
            if upstream
            else {"kind": "teacher", "digest": recipe.spec["model"]},
            "tasks": scored,
            "average": statistics.fmean(result["value"] for result in scored.values()) if scored else None,
            **{key: value for key, value in results.items() if key != "tasks"},
        },
    )


def _harness(runtime: Runtime, spec: dict[str, Any], inputs: Mapping[str, Path]) -> Any:
    from sdd.evaluation.harness import Harness

    source = inputs["model"] if "model" in inputs else runtime.source(spec["model"], "model")
    model, tokenizer_folder = open_student(source, runtime, spec["dtype"])
    tokenizer = checkpoints.load_tokenizer(tokenizer_folder)
    limits = runtime.evaluation_batch_size, spec["max_new_tokens"]
    return Harness(model, tokenizer, *limits, spec["system_prompt"], spec["chat_template"])


def _each(scratch: Path, names: list[str], run: Callable[[Any, str], Rows], harness: Callable[[], Any]) -> None:
    """Leave `<name>.jsonl` of every task in `scratch`; those that are there are kept, the model is opened if needed."""
    opened = None
    for name in tqdm(names, desc="evaluate", unit="task"):
        path = scratch / f"{name}.jsonl"
        if not path.is_file():
            opened = opened or harness()
            write_jsonl(path, run(opened, name))


def _embedded(
    runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], scratch: Path
) -> tuple[dict[str, Any], dict[str, Rows]]:
    from sdd.evaluation.harness import summary

    spec = recipe.spec
    tasks = suite_tasks(spec["suite"], list(spec["tasks"]), spec["split"], spec["seed"], spec["limit"])
    _check_digests(spec, {name: digest_of(dataclasses.asdict(task)) for name, task in tasks.items()})
    _each(scratch, list(tasks), lambda harness, name: harness.run(tasks[name]), lambda: _harness(runtime, spec, inputs))
    records = {name: list(read_jsonl(scratch / f"{name}.jsonl")) for name in tasks}
    results = {name: summary(tasks[name].kind, rows) for name, rows in records.items()}
    apart = {name: result for name, result in results.items() if tasks[name].kind == "likelihood"}
    return {"tasks": {n: r for n, r in results.items() if n not in apart}, "likelihood": apart}, records


def _stock(
    runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], scratch: Path
) -> tuple[dict[str, Any], dict[str, Rows]]:
    """lm-eval's tasks. All rows are loaded before the model, so that a missing network or field costs no time."""
    spec = recipe.spec
    benchmark = Benchmark(spec["suite"], spec["asked"], spec["num_fewshot"])
    _check_digests(spec, benchmark.digests())
    files = None
    if "files" in spec["data"]:
        files = {name: runtime.source(digest, f"task file {name}") for name, digest in spec["data"]["files"].items()}
    names = [task.name for task in benchmark.tasks]
    built = {name: benchmark.build(name, files) for name in names if not (scratch / f"{name}.jsonl").is_file()}

    def opened() -> Any:
        harness = _harness(runtime, spec, inputs)
        for name, task in built.items():
            harness.prepare(name, task)
        return harness

    def run(harness: Any, name: str) -> Rows:
        outcome = harness.run_stock(name, built.pop(name), spec["limit"])
        return [{"values": outcome.values, "counts": outcome.counts}, *outcome.records]

    _each(scratch, names, run, opened)
    outcomes = {}
    for name in names:
        head, *rows = read_jsonl(scratch / f"{name}.jsonl")
        outcomes[name] = Outcome(head["values"], head["counts"], rows)
    counted, beside, records = benchmark.results(outcomes)
    return {"tasks": counted, "beside": beside}, records


def _check_digests(spec: dict[str, Any], found: dict[str, str]) -> None:
    for name, digest in spec["tasks"].items():
        if found.get(name) != digest:
            raise UserError(f"task {name} differs from the one that this recipe names; use the version that made it")
