"""What a config file may say: the command line is trusted, files are not.

An experiment, a folder given with `--config-dir`, a colleague's study: any of them may set this project's own groups
and the few settings of `hydra` listed here (what is swept, over how many workers, how much is logged). All else under
`hydra` comes from the project or from the command line. Each rule allows; what no rule allows is refused. Text in a
file may stand for another setting (`${finetune.mode}`), and for nothing else: no resolver is called, and nothing is
written so that it would be resolved a second time. Knows nothing of where files come from.
"""

import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from omegaconf.errors import OmegaConfBaseException

from sdd.allowed import interpolations
from sdd.errors import UserError

LARGEST = 1 << 20
"""Bytes of a config file."""
DEEPEST = 100
"""Levels of a config file."""
MOST_NODES = 50_000
"""Values of a config file once its aliases are written out."""

_PLAIN = (bool, int, float)
_SWEPT = re.compile(r"[A-Za-z_][\w.@/-]*")
_LAUNCHER_WORD = re.compile(r"[a-z_]+")


def check_yaml(text: str, where: str) -> None:
    """Refuse YAML that is broken, too deep, or grows when its aliases are written out."""
    try:
        if _depth(text) > DEEPEST:
            raise RecursionError
        if "&" in text and "*" in text:
            _written_out(yaml.compose(text, Loader=yaml.SafeLoader), {}, where)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UserError(f"{where}{line}: not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML ({str(error).splitlines()[0]})") from None
    except RecursionError:
        raise UserError(f"{where}: YAML that is nested too deeply") from None


def _depth(text: str) -> int:
    """How deep brackets nest, or blocks by two spaces; no less than YAML's own depth."""
    deepest = max(map(len, re.findall(r"^ +", text, re.M)), default=0) // 2
    if text.count("[") + text.count("{") > DEEPEST:
        deepest = max(deepest, *accumulate((c in "[{") - (c in "]}") for c in text))
    return deepest


def _written_out(node: Any, sizes: dict[int, int | None], where: str) -> int:
    """How many values a YAML node stands for; one within itself, or too many, is refused."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = None
        children = node.value if isinstance(node, yaml.SequenceNode) else [one for pair in node.value for one in pair]
        sizes[id(node)] = 1 + sum(_written_out(child, sizes, where) for child in children)
    size = sizes[id(node)]
    if size is None:
        raise UserError(f"{where}: an alias that holds itself")
    if size > MOST_NODES:
        raise UserError(f"{where}: its aliases stand for more than {MOST_NODES:,} values")
    return size


def check_defaults(defaults: Any, where: str) -> None:
    """A defaults list names options that lie within the search path, by plain words or by the choice of a group."""
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        for text in _strings(entry):
            if any(part == ".." for part in re.split(r"[/\\]", text.split("@")[0])):
                raise UserError(f"{where}: the defaults list leaves its folder ({text})")
            if re.match(r"(_global_\.)?hydra\b", text.partition("@")[2]):
                raise UserError(f"{where}: the defaults list puts {text} under hydra, which a config file may not")
            if _calls(text, f"{where}: defaults"):
                raise UserError(f"{where}: the defaults list calls a resolver ({text}), which a config file may not")


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for part in (key, item) for text in _strings(part)]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def check_shared(config: Any, where: str) -> None:
    """Refuse what a config file may not set; `config` is its plain content at the place where it will stand."""
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if key == "hydra":
            _check_hydra(value, where)
        elif key == "paths":
            _check_paths(value, where)
        else:
            _check_value(value, str(key), where)


def _check_value(value: Any, key: str, where: str) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            _check_value(name, f"{key}.{name}", where) if isinstance(name, str) else None
            _check_value(item, f"{key}.{name}", where)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_value(item, f"{key}[{index}]", where)
    elif isinstance(value, str) and (calls := _calls(value, f"{where}: {key}")):
        verb = "reads an environment variable" if "env" in calls[0] else f"calls {calls[0]!r}"
        raise UserError(f"{where}: {key} {verb} ({value}), which a config file may not; say it on the command line")


def _calls(text: str, where: str) -> tuple[str, ...]:
    """The resolvers that a string calls; one that would be resolved a second time is refused."""
    if "${" not in text:
        return ()
    if re.search(r"\\+\$\{", text):
        raise UserError(f"{where} escapes an interpolation ({text}), which a config file may not; refused")
    try:
        return interpolations(text)[0]
    except OmegaConfBaseException:
        raise UserError(f"{where}={text} is not a valid interpolation") from None


def _check_paths(paths: Any, where: str) -> None:
    for key, value in paths.items() if isinstance(paths, dict) else [("", paths)]:
        parts = Path(value).parts if isinstance(value, str) and value.isprintable() and "$" not in value else ()
        if key != "artifacts" or not parts or parts[0] not in ("artifacts", "outputs") or ".." in parts:
            raise UserError(
                f"{where}: paths.{key}={value} is not a config file's to set; it may name a folder in artifacts/ or "
                "outputs/ here, or say it on the command line"
            )
        if not Path(value).resolve().is_relative_to(Path(parts[0]).resolve()):
            raise UserError(f"{where}: paths.artifacts={value} is a link out of {parts[0]}/")


def _check_hydra(node: Any, where: str) -> None:
    """`mode`, `verbose`, what is swept, and plain numbers of launcher and sweeper."""
    if not isinstance(node, dict):
        raise _not_allowed("", node, where)
    for key, value in node.items():
        if key == "mode" and value in ("RUN", "MULTIRUN"):
            continue
        if key == "verbose" and (isinstance(value, bool) or _words(value)):
            continue
        if key not in ("sweeper", "launcher") or not isinstance(value, dict):
            raise _not_allowed(str(key), value, where)
        for name, setting in value.items():
            place = f"{key}.{name}"
            if key == "sweeper" and name == "params" and isinstance(setting, dict):
                _check_swept(setting, where)
            elif place == "sweeper.sampler" and isinstance(setting, dict):
                for one, number in setting.items():
                    if one != "_target_" and not isinstance(number, _PLAIN):
                        raise _not_allowed(f"{place}.{one}", number, where)
            elif place == "sweeper.direction" and _words(setting):
                continue
            elif not (_LAUNCHER_WORD.fullmatch(str(name)) and (setting is None or isinstance(setting, _PLAIN))):
                raise _not_allowed(place, setting, where)


def _words(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) and re.fullmatch(r"[\w.]+", item) for item in items)


def _check_swept(params: dict[Any, Any], where: str) -> None:
    """Settings of this project and what they are swept over. These words become overrides, so they call nothing."""
    for key, value in params.items():
        if not (isinstance(key, str) and _SWEPT.fullmatch(key)) or re.split(r"[./@]", key)[0] in ("hydra", "paths"):
            raise _not_allowed(f"sweeper.params.{key}", value, where)
        if ".." in f"{key}={value}":
            raise UserError(f"{where}: hydra.sweeper.params.{key}={value} leaves the search path; refused")
        if isinstance(value, dict | list) or "$" in str(value):
            raise UserError(f"{where}: hydra.sweeper.params.{key}={value} must be plain choices, such as 1,2,3")


def _not_allowed(key: str, value: Any, where: str) -> UserError:
    name = ".".join(part for part in ("hydra", key) if part)
    return UserError(f"{where}: {name}={value} is not a config file's to set; give it on the command line")
