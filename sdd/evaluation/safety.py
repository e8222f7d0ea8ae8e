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
from types import ModuleType, SimpleNamespace
from typing import Any

from sdd.errors import UserError
from sdd.evaluation.definitions import Definition, packaged

LIBRARY = "evaluate"
"""The package that imports metrics by name; its namesake in the working folder would do as well."""
PACKAGES = frozenset(
    [
        *("__future__", "abc", "absl", "antlr4", "ast", "collections", "contextlib", "copy", "csv", "dataclasses"),
        *("datasets", "datetime", "decimal", "difflib", "emoji", "enum", "fractions", "fugashi", "functools"),
        *("fuzzywuzzy", "hashlib", "html", "immutabledict", "importlib.metadata", "inspect", "iso639", "itertools"),
        *("jieba", "json", "jsonschema", "langcodes", "langdetect", "lm_eval", "logging", "math", "math_verify"),
        *("neologdn", "nltk", "numbers", "numpy", "operator", "os", "packaging", "pandas", "pathlib", "pycountry"),
        *("pymorphy3", "random", "re", "regex", "rouge", "rouge_score", "sacrebleu", "scipy", "signal", "sklearn"),
        *("statistics", "statsmodels", "string", "sympy", "sys", "textwrap", "time", "torch", "tqdm"),
        *("transformers.data.metrics.squad_metrics", "types", "typing", "typing_extensions", "unicodedata"),
        *("warnings", "wonderwords", "word2number", "xml"),
    ]
)
"""What the functions of a task may be made of: computing and text; no processes, no requests, no models, no pickles."""
RUNNING = ("eval", "exec", "compile", "__import__")
LIKELIHOODS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
"""Kinds of tasks whose metrics lm-eval computes from likelihoods: the function that a metric's name has is not used."""


def check(task: Definition) -> None:
    """Refuse a task that would run code which comes neither with lm-eval nor with this project."""
    what = f"evaluation.tasks: {task.name}"
    if task.setting("unsafe_code") not in (None, False):
        raise UserError(f"{what} runs code that the model writes, which is never done here")
    if not task.home.resolve().is_relative_to(packaged()):
        raise UserError(f"{what} is not one of lm-eval's own tasks")
    config = {**task.config, **task.overrides}
    for name in _metrics(config):
        if name not in _own_metrics():
            raise UserError(
                f"{what} wants the metric {name}, which would be fetched by its name and run; not done here"
            )
    for function in _functions(config):
        source, _, name = function.rpartition(".")
        if not Path(f"{source}.py").resolve().is_relative_to(packaged()):
            raise UserError(f"{what} names a function outside of lm-eval's package, which is never run")
        if reached := _unsafe(Path(f"{source}.py")).get(name):
            raise UserError(f"{what} uses {reached}, which can fetch or run more than lm-eval has; never done here")


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
        if metric.get("hf_evaluate") and config.get("output_type") not in LIKELIHOODS:
            yield f"{name} of the library {LIBRARY}"
        elif not _is_function(name):
            yield name


def _is_function(value: str) -> bool:
    """lm-eval's index gives a function as the path of its module, a dot and its name."""
    return value.startswith("/") and Path(value.rpartition(".")[0] + ".py").is_file()


def _functions(value: Any) -> Iterator[str]:
    return (text for text in _strings(value) if _is_function(text))


@cache
def _unsafe(source: Path) -> Mapping[str, str]:
    """Names of a module's functions and classes that reach a package which is not in `PACKAGES`, or a function that
    runs text, directly or through others of the module; each with what it reaches."""
    if not source.is_file():
        return {}
    tree = ast.parse(source.read_text())
    reached = {name: name for name in RUNNING} | dict(_imported(tree))
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    at_import = [node for node in tree.body if node not in definitions and not isinstance(node, ast.If)]
    before = -1
    while len(reached) != before:
        before = len(reached)
        for node in definitions:
            if node.name not in reached and (used := _uses(node, reached)) is not None:
                reached[node.name] = used
    whole = next((used for node in at_import if (used := _uses(node, reached)) is not None), None)
    return {node.name: whole or reached[node.name] for node in definitions if whole or node.name in reached}


def _uses(node: ast.AST, reached: Mapping[str, str]) -> str | None:
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and part.id in reached:
            return reached[part.id]
        is_member = isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "os"
        if is_member and part.attr not in ("path", "environ", "getenv"):  # type: ignore[attr-defined]
            return f"os.{part.attr}"  # type: ignore[attr-defined]
    return None


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in this module, what it is) of everything imported, at the top or inside, that is not allowed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name not in PACKAGES and alias.name.split(".")[0] not in PACKAGES:
                    yield alias.asname or alias.name.split(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.startswith("lm_eval.tasks."):
                path = packaged().joinpath(*module.split(".")[2:]).with_suffix(".py")
                unsafe = _unsafe(path)
                refused = [alias for alias in node.names if alias.name in unsafe]
                yield from ((alias.asname or alias.name, unsafe[alias.name]) for alias in refused)
            elif node.level or (module not in PACKAGES and module.split(".")[0] not in PACKAGES):
                yield from ((alias.asname or alias.name, module or ".") for alias in node.names)


def keep_library_out() -> None:
    """Whatever asks for the library that imports metrics by name gets one whose metrics are never computed."""

    def load(name: Any, *_: Any, **__: Any) -> Any:
        def compute(*_: Any, **__: Any) -> Any:
            raise UserError(f"evaluation.tasks: the metric {name} would be fetched by its name and run; not done here")

        return SimpleNamespace(compute=compute)

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
