"""What of lm-eval's tasks is run: its own metrics and its own functions, on rows from where the plan says.

A metric that lm-eval does not have itself is fetched by its name from a hub, or from a folder of that name in the
working folder, and imported: that never happens here. A dataset's name stands for a repository of the hub, and never
for a folder that happens to have it. Judged from the definitions, before anything of a task is imported.
"""

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from sdd.errors import UserError
from sdd.evaluation.definitions import Definition, packaged

LIBRARY = "evaluate"
"""The package that imports metrics by name; its namesake in the working folder would do as well."""


def check(task: Definition) -> None:
    """Refuse a task that would run code which comes neither with lm-eval nor with this project."""
    what = f"evaluation.tasks: {task.name}"
    if task.setting("unsafe_code") not in (None, False):
        raise UserError(f"{what} runs code that the model writes, which is never done here")
    if not task.home.resolve().is_relative_to(packaged().resolve()):
        raise UserError(f"{what} is not one of lm-eval's own tasks")
    config = {**task.config, **task.overrides}
    for name in _metrics(config):
        if name not in _own_metrics():
            raise UserError(
                f"{what} wants the metric {name}, which would be fetched by its name and run; not done here"
            )
    for function in _functions(config):
        source, _, name = function.rpartition(".")
        if not Path(f"{source}.py").resolve().is_relative_to(packaged().resolve()):
            raise UserError(f"{what} names a function outside of lm-eval's package, which is never run")
        if name in _using_library(Path(f"{source}.py")):
            raise UserError(f"{what} fetches a metric by its name and runs it, which is never done here")


@cache
def _own_metrics() -> frozenset[str]:
    import lm_eval.api.metrics  # noqa: F401
    from lm_eval.api.registry import metric_registry

    return frozenset(metric_registry.keys())


def _metrics(config: Mapping[str, Any]) -> Iterator[str]:
    """Names of metrics that lm-eval looks up; where a task processes its own results, they are labels."""
    if config.get("process_results") is not None:
        return
    for metric in config.get("metric_list") or ():
        name = str(metric.get("metric"))
        if metric.get("hf_evaluate"):
            yield f"{name} of the library {LIBRARY}"
        elif not _is_function(name):
            yield name


def _is_function(value: str) -> bool:
    """lm-eval's index gives a function as the path of its module, a dot and its name."""
    return value.startswith("/") and Path(value.rpartition(".")[0] + ".py").is_file()


def _functions(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for member in value.values():
            yield from _functions(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _functions(member)
    elif isinstance(value, str) and _is_function(value):
        yield value


@cache
def _using_library(source: Path) -> frozenset[str]:
    """Names of a module's functions and classes that use the library that imports metrics, directly or through others;
    all of them where it is used as the module is imported."""
    if not source.is_file():
        return frozenset()
    tree = ast.parse(source.read_text())
    tainted: set[str] = set()
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tainted |= {each.asname or each.name for each in node.names if each.name.split(".")[0] == LIBRARY}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == LIBRARY:
            tainted |= {each.asname or each.name for each in node.names}
    before = -1
    while tainted and len(tainted) != before:
        before = len(tainted)
        for node in definitions:
            if any(isinstance(each, ast.Name) and each.id in tainted for each in ast.walk(node)):
                tainted.add(node.name)
    rest = [node for node in tree.body if node not in definitions]
    if any(
        isinstance(e, ast.Name) and isinstance(e.ctx, ast.Load) and e.id in tainted for n in rest for e in ast.walk(n)
    ):
        return frozenset(node.name for node in definitions)
    return frozenset(tainted)


def keep_library_out() -> None:
    """Whatever asks for the library that imports metrics by name gets one that does not."""

    def load(name: Any, *_: Any, **__: Any) -> Any:
        raise UserError(f"evaluation.tasks: the metric {name} would be fetched by its name and run; not done here")

    stub = ModuleType(LIBRARY)
    stub.load = load  # type: ignore[attr-defined]
    sys.modules[LIBRARY] = stub


def check_not_here(task: Definition) -> None:
    """Refuse to read rows from the hub where a local folder or file has the name of the task's dataset."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    given = task.setting("dataset_kwargs") or {}
    names = [given.get("data_dir"), *_strings(given.get("data_files"))]
    if task.setting("dataset_path") not in _PACKAGED_DATASETS_MODULES:
        names.append(task.setting("dataset_path"))
    for name in names:
        if isinstance(name, str) and Path(name).exists():
            raise UserError(
                f"{task.name}: {name} in the working folder has the name of the task's dataset and would be read in "
                "its place; move it, or name local files with evaluation.data_dir"
            )


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _strings(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _strings(member)
