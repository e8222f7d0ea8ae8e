"""Stage `evaluated`: every task of a suite on one model; a killed evaluation keeps its finished tasks.

The embedded suite and lm-eval's tasks go the same way: what was asked, one task at a time, then the results from what
every task left.
"""

import dataclasses
import importlib.metadata
import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.architectures.configs import stock_config
from sdd.errors import UserError
from sdd.evaluation.benchmark import Benchmark, Outcome
from sdd.evaluation.suites import SUITES
from sdd.evaluation.tiny import KINDS, suite_tasks
from sdd.forward import parts, ranks
from sdd.models.checkpoints import Checkpoint
from sdd.models.vllm import check_vllm
from sdd.planning import estimates
from sdd.planning.estimates import Estimate
from sdd.stages.runtime import Runtime
from sdd.stages.sharing import shared
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.stages.student import checkpoint_of, open_student, stock_checkpoint
from sdd.store import SCRATCH, Recipe, digest_of
from sdd.store.files import read_jsonl, write_json, write_jsonl
from sdd.study import Study

log = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Asked(Spec):
    """How a model is asked, whatever the tasks; `model` where it is the unpruned one, else the input `model`.

    `backend` is who computed where that is not this process, and `served_as` what a server calls the model: which one
    that is, only whoever started it can say.

    The first of its subclasses' bases, so that their tasks come before it in a manifest.
    """

    limit: int | None
    chat_template: Any
    system_prompt: str | None
    dtype: str
    max_new_tokens: int | None
    lm_eval: str
    model: str | None = None
    backend: dict[str, Any] | None = None
    served_as: str | None = None


@dataclass(frozen=True)
class EmbeddedTasks(Spec):
    """The embedded suite's tasks by digest, and which of their items."""

    suite: str
    tasks: dict[str, str]
    split: str
    seed: int


@dataclass(frozen=True)
class StockTasks(Spec):
    """lm-eval's tasks by digest, as they were `asked` for, and their rows: files by digest, or commits of the hub."""

    suite: str
    tasks: dict[str, str]
    data: dict[str, Any]
    asked: list[str]
    num_fewshot: int | None


@dataclass(frozen=True)
class Embedded(Asked, EmbeddedTasks):
    """The embedded suite on one model."""


@dataclass(frozen=True)
class Stock(Asked, StockTasks):
    """lm-eval's tasks on one model."""


def read_spec(recipe: Recipe) -> Embedded | Stock:
    return Embedded.read(recipe.spec) if recipe.spec.get("suite") == "tiny" else Stock.read(recipe.spec)


# ---- what is asked for --------------------------------------------------------------------------------------------


def recipe(study: Study, student: Recipe | None) -> Recipe:
    """`student` is what is evaluated, None for the unpruned model."""
    settings, models = study.config.evaluation, study.models
    template = models.plain_template(models.digest) if settings.chat_template else None
    shared = {
        "suite": settings.suite,
        "limit": settings.limit,
        "chat_template": template or settings.chat_template,
        "system_prompt": settings.system_prompt,
        "dtype": models.dtype("evaluation"),
        "max_new_tokens": settings.max_new_tokens,
        "lm_eval": _lm_eval(),
        "model": models.digest if student is None else None,
        "backend": _backend(settings),
        "served_as": settings.model if settings.backend == "server" else None,
    }
    tasks = _embedded_tasks(study) if settings.suite == "tiny" else _stock_tasks(study)
    spec = (Embedded if settings.suite == "tiny" else Stock)(**shared, **tasks)
    inputs, labels = ({}, {}) if student is None else ({"model": student}, student.labels)
    return study.recipe("evaluated", spec, inputs, labels, study.raised_for(student, spec.dtype))


def _backend(settings: Any) -> dict[str, Any] | None:
    """Who computes, where it is not this process. Where a server is, and how it is asked, is none of it."""
    if settings.backend == "hf":
        return None
    as_text = settings.backend == "server" and not settings.prompt_ids
    return {"kind": settings.backend} | ({"prompt_ids": False} if as_text else {})


def check_backend(study: Study, runtime: Runtime, spec: Embedded | Stock) -> None:
    """Refuse a backend that cannot work, before any work."""
    kind = (spec.backend or {}).get("kind")
    if kind == "vllm":
        check_vllm("evaluation.backend=vllm", runtime.device, "hf or server")
    if kind == "server":
        from sdd.evaluation import server

        how = str(spec.served_as), study.config.evaluation.prompt_ids
        tokenizer = study.models.checkpoint.tokenizer()
        server.check(runtime.servers.get("evaluation"), *how, tokenizer, _by_likelihood(study, spec))


def _by_likelihood(study: Study, spec: Embedded | Stock) -> list[str]:
    """The tasks that likelihoods are needed for."""
    if isinstance(spec, Embedded):
        return [name for name in spec.tasks if name in KINDS]
    tasks = planned_benchmark(study.config.evaluation).tasks
    return [task.name for task in tasks if task.setting("output_type") != "generate_until"]


@cache
def _lm_eval() -> str:
    return importlib.metadata.version("lm-eval")


def _embedded_tasks(study: Study) -> dict[str, Any]:
    settings = study.config.evaluation
    for key in ("data_dir", "num_fewshot"):
        if settings[key] is not None:
            raise UserError(f"evaluation.{key} belongs to lm-eval's tasks; leave it out with evaluation=tiny")
    if settings.max_new_tokens is None:
        raise UserError("evaluation.max_new_tokens=null, but the embedded tasks set no limit; give a number")
    names = None if settings.tasks is None else list(settings.tasks)
    tasks = suite_tasks(settings.suite, names, settings.split, settings.seed, settings.limit)
    digests = {name: digest_of(dataclasses.asdict(task)) for name, task in tasks.items()}
    return {"tasks": digests, "split": settings.split, "seed": settings.seed}


def benchmark_of(settings: Any) -> Benchmark:
    """lm-eval's tasks that the evaluation's node asks for."""
    names = None if settings.tasks is None else list(settings.tasks)
    return Benchmark(settings.suite, names, settings.num_fewshot)


def planned_benchmark(settings: Any) -> Benchmark:
    """The same to be looked at only: found and digested once in a process, for all jobs of a sweep."""
    names = None if settings.tasks is None else tuple(settings.tasks)
    return _planned_benchmark(settings.suite, names, settings.num_fewshot)


@cache
def _planned_benchmark(suite: str, names: tuple[str, ...] | None, num_fewshot: int | None) -> Benchmark:
    return Benchmark(suite, None if names is None else list(names), num_fewshot)


def check_rows(study: Study) -> None:
    """Read every row that lm-eval's tasks ask for, from the hub where no files are given; the tasks are kept."""
    benchmark = benchmark_of(study.config.evaluation)
    data, files = benchmark.data(study.config.evaluation.data_dir, study.digest_memory)
    study.tasks |= benchmark.built({name: files[digest] for name, digest in data["files"].items()} if files else None)


def fetch_rows(study: Study) -> None:
    """Have the rows of lm-eval's tasks fetched, once for all jobs of a process that ask for the same."""
    settings = study.config.evaluation
    if settings.suite != "tiny" and settings.data_dir is None:
        _fetch_rows(settings.suite, None if settings.tasks is None else tuple(settings.tasks), settings.num_fewshot)


@cache
def _fetch_rows(suite: str, names: tuple[str, ...] | None, num_fewshot: int | None) -> None:
    Benchmark(suite, None if names is None else list(names), num_fewshot).built(None)


def _stock_tasks(study: Study) -> dict[str, Any]:
    settings = study.config.evaluation
    if settings.suite not in SUITES:
        raise UserError(f"evaluation.suite={settings.suite} is unknown; choose one of tiny, {', '.join(SUITES)}")
    if settings.split is not None:
        what = f"evaluation.split={settings.split}"
        raise UserError(f"{what}, but lm-eval's tasks name their own split; set evaluation.split=null")
    benchmark = planned_benchmark(settings)
    data, files = benchmark.data(settings.data_dir, study.digest_memory)
    study.sources |= files
    asked = {"asked": benchmark.names, "num_fewshot": settings.num_fewshot}
    return {"tasks": benchmark.digests(), "data": data, **asked}


LESS = ("evaluation.batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    settings, spec = sizes.config.evaluation, read_spec(recipe)
    cost_model = (
        sizes.student(spec.dtype) if "model" in recipe.inputs else sizes.cost_model(sizes.shape.blocks, spec.dtype)
    )
    if isinstance(spec, Embedded):
        tasks = [estimates.EMBEDDED_TASK] * len(spec.tasks)
    else:
        tasks = estimates.tasks_of(planned_benchmark(settings).sizes())
    batch = sizes.setting("evaluation.batch_size")
    needed = estimates.evaluated(cost_model, tasks, settings.limit, batch, settings.max_new_tokens)
    return estimates.elsewhere(needed) if (spec.backend or {}).get("kind") == "server" else needed


# ---- building -----------------------------------------------------------------------------------------------------


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`samples/<task>.jsonl` and `results.json`, every value of which can be recomputed from the samples."""
    spec = read_spec(recipe)
    if spec.backend is None and shared(build, runtime, recipe, inputs, folder):
        return
    scratch = folder / SCRATCH
    scratch.mkdir(exist_ok=True)
    if isinstance(spec, Embedded):
        outcome = _embedded(runtime, spec, inputs, scratch)
    else:
        outcome = _stock(runtime, spec, inputs, scratch)
    if ranks.rank() > 0:
        return
    results, records = outcome()
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
            else {"kind": "teacher", "digest": spec.model},
            "tasks": scored,
            "average": statistics.fmean(result["value"] for result in scored.values()) if scored else None,
            **{key: value for key, value in results.items() if key != "tasks"},
        },
    )


def _harness(runtime: Runtime, spec: Embedded | Stock, inputs: Mapping[str, Path], scratch: Path) -> Any:
    from sdd.evaluation import backends, server
    from sdd.evaluation.harness import Harness

    source = inputs["model"] if "model" in inputs else runtime.source(str(spec.model), "model")
    kind = (spec.backend or {}).get("kind")
    if kind is None:
        model, base = open_student(source, runtime, spec.dtype)
        tokenizer = base.tokenizer()
        language_model = backends.in_process(model, tokenizer, runtime.evaluation_batch_size)
    elif kind == "vllm":
        folder = stock_checkpoint(source, runtime, spec.dtype, scratch / "checkpoint")
        tokenizer = Checkpoint(folder).tokenizer()
        language_model = backends.by_vllm(folder, tokenizer, spec.dtype)
    else:
        base = checkpoint_of(source, runtime)
        tokenizer, config = base.tokenizer(), stock_config(base.config, base.where)
        if "evaluation" not in runtime.servers:
            raise UserError("a server answered this evaluation; say where it is with --server URL")
        if source.name not in str(spec.served_as):
            log.warning("evaluation.model=%s: that it is %s, the server's user says", spec.served_as, source.name)
        how = str(spec.served_as), (spec.backend or {}).get("prompt_ids", True)
        language_model = server.by_server(runtime.servers["evaluation"], *how, config, tokenizer)
    return Harness(language_model, tokenizer, spec.max_new_tokens, spec.system_prompt, spec.chat_template)


def _each(scratch: Path, names: list[str], run: Callable[[Any, str], Rows], harness: Callable[[], Any]) -> None:
    """Leave `<name>.jsonl` of every task in `scratch`; those that are there are kept, and of one that a kill has cut
    what this process computed. The model is opened if needed."""
    opened = None
    for name in tqdm(names, desc="evaluate", unit="task"):
        path = scratch / f"{name}.jsonl"
        if not path.is_file():
            opened = opened or harness()
            opened.kept = scratch / name
            rows = run(opened, name)
            if ranks.rank() == 0:
                write_jsonl(path, rows)
                parts.forget(opened.kept)


def _embedded(
    runtime: Runtime, spec: Embedded, inputs: Mapping[str, Path], scratch: Path
) -> Callable[[], tuple[dict[str, Any], dict[str, Rows]]]:
    """Have the tasks run; what gives results, and records by task, from what they left in `scratch`."""
    from sdd.evaluation.harness import summary

    tasks = suite_tasks(spec.suite, list(spec.tasks), spec.split, spec.seed, spec.limit)
    _check_digests(spec, {name: digest_of(dataclasses.asdict(task)) for name, task in tasks.items()})
    _each(
        scratch,
        list(tasks),
        lambda harness, name: harness.run(tasks[name]),
        lambda: _harness(runtime, spec, inputs, scratch),
    )

    def outcome() -> tuple[dict[str, Any], dict[str, Rows]]:
        records = {name: list(read_jsonl(scratch / f"{name}.jsonl")) for name in tasks}
        results = {name: summary(tasks[name].kind, rows) for name, rows in records.items()}
        apart = {name: result for name, result in results.items() if tasks[name].kind == "likelihood"}
        return {"tasks": {n: r for n, r in results.items() if n not in apart}, "likelihood": apart}, records

    return outcome


def _stock(
    runtime: Runtime, spec: Stock, inputs: Mapping[str, Path], scratch: Path
) -> Callable[[], tuple[dict[str, Any], dict[str, Rows]]]:
    """The same of lm-eval's. All rows are loaded before the model, so that a missing network or field costs no time."""
    benchmark = Benchmark(spec.suite, spec.asked, spec.num_fewshot)
    _check_digests(spec, benchmark.digests())
    files = None
    if "files" in spec.data:
        files = {name: runtime.source(digest, f"task file {name}") for name, digest in spec.data["files"].items()}
    names = [task.name for task in benchmark.tasks]
    missing = [name for name in names if not (scratch / f"{name}.jsonl").is_file()]
    built = {name: runtime.tasks.pop(name, None) for name in missing}
    built |= {name: benchmark.build(name, files) for name, task in built.items() if task is None}

    def opened() -> Any:
        harness = _harness(runtime, spec, inputs, scratch)
        for name, task in built.items():
            harness.prepare(name, task)
        return harness

    def run(harness: Any, name: str) -> Rows:
        outcome = harness.run_stock(name, built.pop(name), spec.limit)
        return [{"values": outcome.values, "counts": outcome.averaged}, *outcome.records]

    _each(scratch, names, run, opened)

    def outcome() -> tuple[dict[str, Any], dict[str, Rows]]:
        outcomes = {}
        for name in names:
            head, *rows = read_jsonl(scratch / f"{name}.jsonl")
            outcomes[name] = Outcome(head["values"], head["counts"], rows)
        counted, beside, records = benchmark.results(outcomes)
        return {"tasks": counted, "beside": beside}, records

    return outcome


def _check_digests(spec: Embedded | Stock, digests: dict[str, str]) -> None:
    for name, digest in spec.tasks.items():
        if digests.get(name) != digest:
            raise UserError(f"task {name} differs from the one that this recipe names; use the version that made it")
