"""What a config may name: the allow-list of `_target_`, log handlers and resolvers; and `build`, which obeys it.

Somebody else's config can choose among this project's parts and the library classes they configure, and run nothing
else. The list is checked on every composed config, the `hydra` node included, before Hydra instantiates anything;
`build` is the only place where a node becomes an object of ours: a name stands for the class that `parts` gives it.
"""

import re
from collections.abc import Container, Mapping
from functools import lru_cache
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import parse

from sdd.config.nodes import unresolved
from sdd.config.own import CLASSES, check_base, is_own
from sdd.config.parts import PLACES, TARGETS, maker_of
from sdd.errors import UserError

ALLOWED_PLUGINS = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
    }
)
ALLOWED_LOGGING = frozenset(
    {
        "logging.Formatter",
        "logging.StreamHandler",
        "logging.FileHandler",
        "logging.NullHandler",
        "colorlog.ColoredFormatter",
    }
)
ALLOWED_RESOLVERS = frozenset({"now", "process_id", "package_folder"})
"""What `${name:...}` may call: values that cannot name a class. `hydra` is allowed outside the `hydra` node."""

_ALLOWED_STREAMS = ("ext://sys.stderr", "ext://sys.stdout")
_LOG_FILE = re.compile(r"\$\{hydra\.runtime\.output_dir\}/[^/].*")
_REFUSED_SETTINGS = {
    ("hydra", "job", "env_set"): "changes the environment",
    ("hydra", "job", "env_copy"): "reads the environment",
    ("hydra", "sweeper", "custom_search_space"): "runs a function of its own",
}
_SAMPLER = re.compile(r"optuna\.samplers\.[A-Z][A-Za-z]*Sampler")


def check_targets(config: DictConfig, own: Container[str] = ()) -> None:
    """Refuse a composed config (its `hydra` node included) that names anything outside the allow-list and `own`.

    Names of classes are literals. Inside the `hydra` node, which is instantiated before any of our code is asked, an
    interpolation stands for a plain value, so that what is checked here is what Hydra will see.
    """
    _check_node(unresolved(config), (), config, own)


def _check_node(node: Any, where: tuple[Any, ...], root: DictConfig, own: Container[str]) -> None:
    if isinstance(node, list):
        for index, value in enumerate(node):
            _check_node(value, (*where, index), root, own)
    elif isinstance(node, dict):
        for key, value in node.items():
            path = (*where, key)
            if path in _REFUSED_SETTINGS and value:
                raise UserError(f"{_dotted(path)} {_REFUSED_SETTINGS[path]}; refused in a config")
            if key == "_target_" and value != MISSING:
                _check_target(value, path, own)
            elif key == "()" or (key == "class" and _in_logging(path)):
                if str(value) not in ALLOWED_LOGGING:
                    raise UserError(f"{_dotted(path)}={value} is not an allowed logging class; refused")
            else:
                _check_node(value, path, root, own)
    elif isinstance(node, str):
        _check_text(node, where, root)


def name_own(config: DictConfig, own: Mapping[str, str]) -> None:
    """Give every class of the user's own its id in a composed config that has been checked."""
    nodes: list[Any] = [config._get_node(key) for key in config if key != "hydra"] if own else []
    while nodes:
        node = nodes.pop()
        if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing() or node._is_interpolation()):
            nodes += [node._get_node(key) for key in node]
            if (name := node.get("_target_")) in own:
                node["_target_"] = own[str(name)]


def _check_target(value: Any, path: tuple[Any, ...], own: Container[str]) -> None:
    plugin = path in (("hydra", "launcher", "_target_"), ("hydra", "sweeper", "_target_"))
    if path == ("hydra", "sweeper", "sampler", "_target_") and _SAMPLER.fullmatch(str(value)):
        return
    if isinstance(value, str) and value in own and _targets_at(path[:-1]):
        check_base(value, str(path[0]), _dotted(path))
        return
    if str(value) not in (ALLOWED_PLUGINS if plugin else _targets_at(path[:-1])):
        raise UserError(f"{_dotted(path)}={value} is not one of this project's parts; refused")


def _targets_at(path: tuple[Any, ...]) -> frozenset[str]:
    """The classes that may stand at a key."""
    for key, names in TARGETS.items():
        if len(key) == len(path) and all(part in ("*", own) for part, own in zip(key, path, strict=True)):
            return names
    return frozenset()


def _check_text(text: str, path: tuple[Any, ...], root: DictConfig) -> None:
    in_hydra, where = path[:1] == ("hydra",), _dotted(path)
    if path[:2] == ("hydra", "launcher") and not text.isprintable():
        raise UserError(f"{where}={text!r} holds a control character, which would reach the batch script; refused")
    if "ext://" in text and text not in _ALLOWED_STREAMS:
        raise UserError(f"{where}={text} is not an allowed stream; refused")
    if "${" not in text:
        return
    try:
        calls, nested, alone = interpolations(text)
    except OmegaConfBaseException:
        raise UserError(f"{where}={text} is not a valid interpolation") from None
    for call in calls:
        if call.startswith(("oc.env", "env")):
            raise UserError(f"{where} reads an environment variable ({text}); pass the value on the command line")
        if call not in ALLOWED_RESOLVERS and (in_hydra or call != "hydra"):
            raise UserError(f"{where}={text} calls {call!r}, which a config may not; refused")
    if in_hydra and nested:
        raise UserError(f"{where}={text} nests interpolations, which a config may not under hydra; refused")
    if _in_logging(path) and not _LOG_FILE.fullmatch(text):
        raise UserError(f"{where}={text} may only begin with ${{hydra.runtime.output_dir}}/ or be plain; refused")
    if in_hydra and alone and OmegaConf.is_config(_resolved(root, path)):
        raise UserError(f"{where}={text} stands for a whole node, which a config may not under hydra; refused")


@lru_cache(maxsize=1024)
def interpolations(text: str) -> tuple[tuple[str, ...], bool, bool]:
    """The resolvers that a string calls (one whose name is itself composed reads `${...}`); whether any interpolation
    nests; and whether there is nothing beside one, which alone can stand for more than text.

    Most strings stand in every job's config, and parsing them is slow.
    """
    calls, nested, root = [], False, parse(text)
    parts = root.text().getChildren()
    alone = [type(part).__name__ for part in parts] == ["InterpolationContext"]
    queue = [(root, 0)]
    while queue:
        tree, depth = queue.pop()
        kind = type(tree).__name__
        if kind == "InterpolationContext":
            depth += 1
            nested |= depth > 1
        elif kind == "ResolverNameContext":
            calls.append(tree.getText())
        queue += [(child, depth) for child in getattr(tree, "children", None) or []]
    return tuple(calls), nested, alone


def _resolved(root: DictConfig, path: tuple[Any, ...]) -> Any:
    """The value at `path`; None where it is not known before the job runs."""
    node: Any = root
    try:
        for key in path:
            node = node[key]
    except OmegaConfBaseException:
        return None
    return node


def _in_logging(path: tuple[Any, ...]) -> bool:
    return path[:2] in (("hydra", "job_logging"), ("hydra", "hydra_logging"))


def _dotted(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def build(node: Any, *args: Any, **values: Any) -> Any:
    """The object that a config node (a mapping with `_target_`) describes, after checking name and arguments."""
    import inspect

    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    name = node.get("_target_")
    if is_own(name) and name not in CLASSES:
        raise UserError(f"_target_={name} is a class of somebody's own, with the digest of its source; allow that one")
    if name not in PLACES and name not in CLASSES:
        raise UserError(f"_target_={name} is not one of this project's parts; refused")
    maker = CLASSES[name] if name in CLASSES else maker_of(name)
    arguments = {key: value for key, value in node.items() if key != "_target_"} | values
    try:
        inspect.signature(maker).bind(*args, **arguments)
    except TypeError as error:
        raise UserError(f"{name}: {error}") from None
    return maker(*args, **arguments)
