"""lm-eval's packaged task definitions: found by name, groups taken apart into their tasks, digested.

Reads YAML only: no function of a definition is imported, no rows are fetched, no model is needed. Nor are the packages
that lm-eval works with: of its own, the files that read definitions are taken alone.
"""

import difflib
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from sdd.errors import UserError
from sdd.evaluation.suites import HOMES
from sdd.store import digest_of, file_digest
from sdd.untrusted import printable

LONGEST_NAME = 200
"""Characters of a task's name that are looked at."""
MOST_FOLDERS = 20
"""Folders that are indexed for names of tasks; more take as long as all."""


@dataclass(frozen=True)
class Definition:
    """One task that runs. `config` is lm-eval's own, functions as names; `overrides` come from the groups above it.

    `home` is the folder of lm-eval's package that defines it.
    """

    name: str
    config: dict[str, Any]
    overrides: dict[str, Any]
    home: Path

    def setting(self, key: str) -> Any:
        return self.overrides.get(key, self.config.get(key))

    def shots(self, asked: int | None) -> int:
        """Examples shown: as asked, but a task that is defined with none keeps to none (lm-eval's own rule)."""
        own = self.setting("num_fewshot")
        return 0 if own == 0 else int(own or 0) if asked is None else asked

    @property
    def evaluated_split(self) -> str:
        return str(self.setting("test_split") or self.setting("validation_split"))

    @property
    def shots_split(self) -> str | None:
        """Where examples are drawn from; None if the definition brings its own."""
        config = self.setting("fewshot_config") or {}
        if split := self.setting("fewshot_split") or config.get("split"):
            return str(split)
        if config.get("samples") is not None:
            return None
        return str(self.setting("training_split") or self.setting("validation_split") or self.setting("test_split"))

    @property
    def shows_the_same(self) -> bool:
        """Whether all items are shown the same examples, the first of a split."""
        config = self.setting("fewshot_config") or {}
        return config.get("sampler") == "first_n"

    def digest(self) -> str:
        """Of every setting, and of the source files of the functions that settings name."""
        return digest_of(_without_paths({"config": self.config, "overrides": self.overrides}))


@dataclass(frozen=True)
class Entry:
    """What was asked for by one name: a task, or a group whose tasks make one value, weighted by size or not."""

    name: str
    tasks: tuple[Definition, ...]
    is_group: bool = False
    weight_by_size: bool = True


def packaged() -> Path:
    """The folder of lm-eval's definitions, free of links, as lm-eval itself names a definition's functions."""
    import lm_eval

    return _folder_of(lm_eval.__file__) / "tasks"


@cache
def _folder_of(file: str) -> Path:
    return Path(file).resolve().parent


def _module(name: str) -> ModuleType:
    """A file of lm-eval, without the packages that it stands in: those import datasets and pandas, for a second."""
    full = f"lm_eval.{name}"
    if full not in sys.modules:
        place = packaged().parent.joinpath(*name.split(".")).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(full, place)
        assert spec is not None and spec.loader is not None, place
        sys.modules[full] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[full]


@cache
def _index(homes: tuple[str, ...] | None) -> Mapping[str, Any]:
    """lm-eval's index of names: of these folders, or of all (None), which takes ten seconds and more."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _module("tasks._yaml_loader")  # by which the index reads
    paths = [packaged()] if homes is None else [packaged() / home for home in homes]
    index: Mapping[str, Any] = _module("tasks._index").TaskIndex.build(paths)
    return index


@cache
def _texts() -> Mapping[str, str]:
    """All definitions by their folder, those that others include too, unparsed, without names of files: in a second."""
    folders: dict[str, list[str]] = {}
    for path in packaged().rglob("*"):
        if not path.is_file() or path.suffix in (".py", ".pyc", ".md"):
            continue
        lines = path.read_text(errors="ignore").splitlines()
        text = "\n".join(line for line in lines if not line.lstrip().startswith("include:"))
        folders.setdefault(path.relative_to(packaged()).parts[0], []).append(text)
    return {folder: "\n".join(texts) for folder, texts in folders.items()}


def _folders_with(name: str) -> set[str]:
    """The folders whose definitions have this name as a word of its own: all that could define or list it."""
    if not re.search(r"\w", name):
        return set()
    word = re.compile(rf"(?<![^\s\"'\[{{,:]){re.escape(name)}(?![^\s\"'\]}},])")
    return {folder for folder, text in _texts().items() if name in text and word.search(text)}


def _unknown(name: str) -> UserError:
    pattern = r"^[ -]*(?:task|group|tag):\s*[\"']?([\w.-]+)"
    names = {name for text in _texts().values() for name in re.findall(pattern, text, re.M)}
    near = difflib.get_close_matches(name[:LONGEST_NAME], sorted(names), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see: python -m lm_eval ls tasks"
    return UserError(f"evaluation.tasks: lm-eval has no task {printable(name[:LONGEST_NAME])}; {hint}")


def _index_for(names: list[str]) -> Mapping[str, Any]:
    """An index that has these names and all that they stand for: of few folders where that can be seen."""
    homes = tuple(sorted(HOMES))
    index = _index(homes)
    others = [name for name in names if name not in index]
    if not others:
        return index
    folders: set[str] = set()
    for name in others:
        mentioned = _folders_with(name)
        if not mentioned:
            raise _unknown(name)
        folders |= mentioned
    if len(folders) <= MOST_FOLDERS:
        index = _index(tuple(sorted({*HOMES, *folders})))
        if all(_is_whole(index, name) for name in others):
            return index
    return _index(None)


def _is_whole(index: Mapping[str, Any], name: str, above: tuple[str, ...] = ()) -> bool:
    """Whether the index has a task, or a group with all its members; of a tag, that cannot be seen."""
    if name not in index or name in above or index[name].kind.name == "TAG":
        return False
    if index[name].kind.name != "GROUP":
        return True
    listed = index[name].cfg["task"]
    members = [member if isinstance(member, str) else member.get("task") or member.get("group") for member in listed]
    return all(isinstance(member, str) and _is_whole(index, member, (*above, name)) for member in members)


def find(names: list[str]) -> list[Entry]:
    """The entries of these names. A tag, or a group without a value of its own, gives an entry per task."""
    index = _index_for(names)
    entries: dict[str, Entry] = {}
    for name in names:
        if name not in index:
            raise _unknown(name)
        entries |= {entry.name: entry for entry in _entries(index, name)}
    _check_disjoint(entries)
    return list(entries.values())


def _entries(index: Mapping[str, Any], name: str) -> Iterator[Entry]:
    tasks = tuple(_tasks(index, name, {}, ()))
    if not tasks:
        raise UserError(f"evaluation.tasks: {name} has no tasks in this version of lm-eval")
    aggregate = (index[name].cfg or {}).get("aggregate_metric_list") if index[name].kind.name == "GROUP" else None
    if aggregate:
        first = aggregate[0] if isinstance(aggregate, list) else aggregate
        yield Entry(name, tasks, is_group=True, weight_by_size=first.get("weight_by_size", True))
    else:
        yield from (Entry(task.name, (task,)) for task in tasks)


def _tasks(
    index: Mapping[str, Any], name: str, overrides: dict[str, Any], above: tuple[str, ...]
) -> Iterator[Definition]:
    """Depth first. As in lm-eval, a member's own settings win over what is asked above, and that over its group's."""
    entry = index[name]
    if name in above:
        raise UserError(f"evaluation.tasks: the group {name} contains itself; name its tasks")
    if entry.kind.name == "TAG":
        for child in sorted(entry.tags):
            yield from _tasks(index, child, overrides, (*above, name))
    elif entry.kind.name == "GROUP":
        structure = {field.name for field in fields(_module("config.group").GroupConfig)}
        shared = {key: value for key, value in entry.cfg.items() if key not in structure} | overrides
        for member in entry.cfg["task"]:
            own = {} if isinstance(member, str) else dict(member)
            child = member if isinstance(member, str) else own.pop("task", None) or own.pop("group", None)
            if child not in index:
                raise UserError(f"evaluation.tasks: the group {name} defines tasks inside itself; name others")
            yield from _tasks(index, child, shared | own, (*above, name))
    else:
        yield Definition(name, entry.cfg, overrides, entry.yaml_path.parent)


def _check_disjoint(entries: Mapping[str, Entry]) -> None:
    seen: dict[str, str] = {}
    for entry in entries.values():
        for task in entry.tasks:
            if task.name in seen:
                raise UserError(f"evaluation.tasks: {task.name} is in both {seen[task.name]} and {entry.name}")
            seen[task.name] = entry.name


def _without_paths(value: Any) -> Any:
    """A function's name, which begins with the package's folder, without it and with its source's digest."""
    if isinstance(value, Mapping):
        return {str(key): _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry) for entry in value]
    root = f"{packaged()}/"
    if isinstance(value, str) and value.startswith(root):
        source = Path(value.rpartition(".")[0] + ".py")
        return {"function": value.removeprefix(root), "source": file_digest(source) if source.is_file() else None}
    return value
