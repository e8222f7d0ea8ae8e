"""A benchmark: lm-eval's tasks by name, from the hub or from local files, and what one model's outcomes come to.

The plan (which definitions, which data, how many examples) is made without a model and without the hub. The tasks that
run are lm-eval's own, built by its task manager; only where rows come from and how many examples are shown is set here.
"""

import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.evaluation import safety
from sdd.evaluation.definitions import Definition, Entry, find
from sdd.evaluation.files import check_file, find_file, folder_of, read_rows
from sdd.evaluation.hub import COMMIT, rows_at
from sdd.evaluation.suites import REVISIONS, asked
from sdd.store import digest_of, remembered_digest
from sdd.untrusted import expanded

log = logging.getLogger(__name__)

STRICT, FLEXIBLE, NO_ANSWER = "strict-match", "flexible-extract", "[invalid]"
"""Filters of lm-eval's free-form tasks, and what a filter gives where it finds no answer."""


@dataclass(frozen=True)
class Outcome:
    """One task on one model: lm-eval's values and standard errors by "metric,filter", and a record per item.

    `averaged` names the metrics that can be averaged over tasks: means of numbers of which more is better.
    """

    values: dict[str, list[float | None]]
    averaged: list[str]
    records: list[dict[str, Any]]


class Benchmark:
    """The tasks that `suite`, `names` and `num_fewshot` stand for."""

    def __init__(self, suite: str, names: list[str] | None, num_fewshot: int | None) -> None:
        self.num_fewshot = num_fewshot
        self._asked = {benchmark_task.task: benchmark_task for benchmark_task in asked(suite, names, num_fewshot)}

    @property
    def names(self) -> list[str]:
        """What was asked for, as it may be asked for again."""
        return list(self._asked)

    @cached_property
    def entries(self) -> list[Entry]:
        entries = find(list(self._asked))
        for entry in entries:
            for task in entry.tasks:
                safety.check(task)
        return entries

    @property
    def tasks(self) -> list[Definition]:
        return [task for entry in self.entries for task in entry.tasks]

    @cached_property
    def _shots(self) -> dict[str, int]:
        shots: dict[str, int] = {}
        for entry in self.entries:
            wanted = self._asked[entry.name].shots if entry.name in self._asked else self.num_fewshot
            shots |= {task.name: task.shots(wanted) for task in entry.tasks}
        return shots

    def _splits(self, task: Definition) -> list[str]:
        """The splits that are read: the one evaluated, and where examples come from if any are shown."""
        source = task.shots_split if self._shots[task.name] else None
        return list(dict.fromkeys([task.evaluated_split, *([source] if source else [])]))

    def digests(self) -> dict[str, str]:
        """Entry -> digest of its definitions, splits, examples shown, the metric that counts, and how a group's tasks
        are weighted where that is not lm-eval's way."""
        return dict(self._digests)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {
            entry.name: digest_of(
                {
                    "tasks": {task.name: [task.digest(), self._shots[task.name]] for task in entry.tasks},
                    "metric": self._metric(entry),
                    **({} if weighted == entry.weight_by_size else {"weight_by_size": weighted}),
                }
            )
            for entry in self.entries
            for weighted in [self._weight_by_size(entry)]
        }

    def sizes(self) -> dict[str, tuple[int, int, bool]]:
        """Entry -> (tasks in it, examples shown before each item, whether they are the same ones before all)."""
        first = {entry.name: (len(entry.tasks), entry.tasks[0]) for entry in self.entries}
        return {name: (count, self._shots[task.name], task.shows_the_same) for name, (count, task) in first.items()}

    def _metric(self, entry: Entry) -> str | None:
        return self._asked[entry.name].metric if entry.name in self._asked else None

    def _weight_by_size(self, entry: Entry) -> bool:
        asked = self._asked[entry.name].weight_by_size if entry.name in self._asked else None
        return entry.weight_by_size if asked is None else asked

    # ---- rows --------------------------------------------------------------------------------------------------

    def local_files(self, data_dir: Path) -> dict[str, Path]:
        """Files by "folder/split", each checked row by row."""
        files: dict[str, Path] = {}
        for task in self.tasks:
            for split in self._splits(task):
                name = f"{folder_of(task)}/{split}"
                if name not in files:
                    files[name] = find_file(data_dir, task, split)
                    check_file(files[name])
        return files

    def revisions(self) -> dict[str, str]:
        """Hub dataset -> commit; `main` where none is known."""
        names = {str(task.setting("dataset_path")) for task in self.tasks}
        return {name: REVISIONS.get(name, "main") for name in sorted(names)}

    def data(self, data_dir: str | None, memory: Path) -> tuple[dict[str, dict[str, str]], dict[str, Path]]:
        """What a recipe says of the rows, and the local files by digest."""
        if data_dir is None:
            return {"revisions": self.revisions()}, {}
        files = self.local_files(expanded(data_dir))
        digests = {name: remembered_digest(path, memory) for name, path in files.items()}
        return {"files": digests}, {digests[name]: path for name, path in files.items()}

    # ---- lm-eval's tasks ---------------------------------------------------------------------------------------

    def build(self, name: str, files: Mapping[str, Path] | None) -> Any:
        """lm-eval's task object with its rows: from `files` by "folder/split", or from the hub where that is None."""
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        (task,) = (task for task in self.tasks if task.name == name)
        shots = self._shots[name]
        safety.keep_library_out()
        if files is None:
            safety.check_not_here(task)
        overrides = task.overrides | {"num_fewshot": shots}
        overrides |= self._from_hub(task) if files is None else self._from_files(task, files)
        try:
            built = self._manager.load([{"group": "sdd", "task": [{"task": name, **overrides}]}])["tasks"][name]
        except UserError:
            raise
        except Exception as error:
            raise _explained(task, files is None, error) from error
        built.set_config("num_fewshot", shots)
        built.set_fewshot_seed(DEFAULT_OTHER_SEED)
        return built

    def built(self, files: Mapping[str, Path] | None) -> dict[str, Any]:
        """Every task by name; what is wrong with the rows of one is known before a model is."""
        return {task.name: self.build(task.name, files) for task in self.tasks}

    @cached_property
    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        homes = sorted({task.home for task in self.tasks})
        return TaskManager(include_path=homes, include_defaults=False)

    def _from_hub(self, task: Definition) -> dict[str, Any]:
        dataset = str(task.setting("dataset_path"))
        if dataset not in REVISIONS:
            log.warning("%s: the commit of %s is not known here; its newest rows are read", task.name, dataset)
        asked = {"revision": REVISIONS.get(dataset, "main"), **(task.setting("dataset_kwargs") or {})}
        if not COMMIT.fullmatch(str(asked["revision"])):
            return {"dataset_kwargs": asked}
        asked.pop("trust_remote_code", None)  # of no effect
        asked["name"] = task.setting("dataset_name")
        return {"custom_dataset": lambda **_: rows_at(dataset, **asked), "dataset_kwargs": None}

    def _from_files(self, task: Definition, files: Mapping[str, Path]) -> dict[str, Any]:
        shots, source = self._shots[task.name], task.shots_split
        rows = {split: read_rows(files[f"{folder_of(task)}/{split}"], task) for split in self._splits(task)}
        if shots and source and len(rows[source]) < shots:
            path = files[f"{folder_of(task)}/{source}"]
            raise UserError(f"{path}: {task.name} shows {shots} examples, but {len(rows[source])} rows are there")

        def dataset(**_: Any) -> dict[str, Any]:
            from datasets import Dataset

            return {split: Dataset.from_list(of_split) for split, of_split in rows.items()}

        unread: dict[str, Any] = {} if shots else {"fewshot_split": task.evaluated_split}
        if not shots and (task.setting("fewshot_config") or {}).get("split"):
            unread["fewshot_config"] = {**task.setting("fewshot_config"), "split": task.evaluated_split}
        return {"custom_dataset": dataset, "dataset_kwargs": None, **unread}

    # ---- results -----------------------------------------------------------------------------------------------

    def results(self, outcomes: Mapping[str, Outcome]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """(tasks of the average, tasks beside it, records), each by entry.

        A group has its mean weighted by size and the plain one: `value` is its suite's, the other stands beside.
        """
        counted: dict[str, Any] = {}
        beside: dict[str, Any] = {}
        records: dict[str, Any] = {}
        for entry in self.entries:
            parts = {task.name: outcomes[task.name] for task in entry.tasks}
            weighted, sizes = self._weight_by_size(entry), {name: len(part.records) for name, part in parts.items()}
            values = _values(parts, weighted) if entry.is_group else next(iter(parts.values())).values
            averaged = [key for key in values if all(key in part.averaged for part in parts.values())]
            metric = self._metric(entry) or chosen_metric(values, averaged)
            result = {**_named(metric), **_pair(values[metric]), "n": sum(sizes.values())}
            result["num_fewshot"] = self._shots[entry.tasks[0].name]
            rows = [_record(entry, name, record, metric) for name, part in parts.items() for record in part.records]
            if rows and "lenient" in rows[0]:
                result |= {key: statistics.fmean(row[key] for row in rows) for key in ("lenient", "malformed")}
            others = {key: value for key, value in values.items() if key != metric}
            result["others"] = {key.removesuffix(",none"): _pair(value) for key, value in others.items()}
            if entry.is_group:
                own = {name: part.values[metric] for name, part in parts.items()}
                result["weight_by_size"] = weighted
                result["unweighted" if weighted else "size_weighted"] = _pair(_values(parts, not weighted)[metric])
                result["subtasks"] = {name: {**_pair(value), "n": sizes[name]} for name, value in own.items()}
            (counted if metric in averaged else beside)[entry.name] = result
            records[entry.name] = rows
        return counted, beside, records


def chosen_metric(values: Mapping[str, Any], averaged: list[str]) -> str:
    """Of a task without a metric by suite: the first that can be averaged, else the first; the others stand beside."""
    return next(iter(averaged or values))


def _named(metric: str) -> dict[str, Any]:
    name, _, filtered = metric.partition(",")
    return {"metric": name} if filtered == "none" else {"metric": name, "filter": filtered}


def _pair(value: list[float | None]) -> dict[str, Any]:
    return {"value": value[0], "stderr": value[1]}


def _values(parts: Mapping[str, Outcome], weight_by_size: bool) -> dict[str, list[float | None]]:
    """A group's values by lm-eval's own rules: means over its tasks and their errors."""
    from lm_eval.api.metrics import aggregate_subtask_metrics, pooled_sample_stderr, unweighted_mean_stderr

    sizes = [len(part.records) for part in parts.values()]
    shared = [key for key in next(iter(parts.values())).values if all(key in part.values for part in parts.values())]
    values_by_metric: dict[str, list[float | None]] = {}
    for key in shared:
        means, errors = zip(*(part.values[key] for part in parts.values()), strict=True)
        error = None
        if None not in errors:
            error = float(pooled_sample_stderr(errors, sizes) if weight_by_size else unweighted_mean_stderr(errors))
        values_by_metric[key] = [float(aggregate_subtask_metrics(list(means), sizes, weight_by_size)), error]
    return values_by_metric


def _record(entry: Entry, task: str, record: dict[str, Any], metric: str) -> dict[str, Any]:
    """A record with its `id` within the entry, its task in a group, and the `score` that its value is made of."""
    measured = record["metrics"]
    named: dict[str, Any] = {"id": f"{task}/{record['doc_id']}" if entry.is_group else str(record["doc_id"])}
    if entry.is_group:
        named["task"] = task
    named["score"] = measured.get(metric)
    flexible = metric.replace(STRICT, FLEXIBLE)
    if flexible != metric and flexible in measured:
        named["lenient"] = measured[flexible]
        named["malformed"] = float(record["filtered"][STRICT] == NO_ANSWER)
    return named | record


def _explained(task: Definition, from_hub: bool, error: Exception) -> UserError:
    """One line for rows that do not come or do not fit; what is neither is not the user's mistake and is raised."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    dataset = task.setting("dataset_path")
    from datasets.exceptions import DatasetsError

    if from_hub and isinstance(error, OSError | DatasetsError | ConnectionError):
        return UserError(
            f"{task.name}: the rows of {dataset} cannot be fetched ({type(error).__name__}: {first}); "
            "check the network, or name local files with evaluation.data_dir"
        )
    if from_hub:
        raise error
    return UserError(
        f"evaluation.data_dir: the rows of {folder_of(task)} do not have the fields that lm-eval's {task.name} reads "
        f"({type(error).__name__}: {first})"
    )
