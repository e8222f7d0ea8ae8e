"""What a config file may say: the command line is trusted, files are not.

An experiment, a folder given with `--config-dir`, a colleague's study: any of them may set this project's own groups
and the few settings of `hydra` listed here (what is swept, over how many workers, how much is logged). All else under
`hydra` comes from the project or from the command line. Each rule allows; what no rule allows is refused. Text in a
file may stand for another setting (`${finetune.mode}`), and for nothing else: no resolver is called, and nothing is
written so that it would be resolved a second time. Knows nothing of where files come from.
"""

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sdd.config.allowed import interpolations
from sdd.errors import UserError

LARGEST = 1 << 20
"""Bytes of a config file."""
DEEPEST = 100
"""Levels of a config file."""
MOST_NODES = 50_000
"""Values of a config file once its aliases are written out."""

LONGEST_WORD = 20_000
"""Characters of an override in a file."""
MOST_JOBS = 10_000
"""Jobs of a sweep."""
TRACKED = ("project", "group", "job_type", "tags", "notes")
"""What a file may say to a tracker: words. Whether there is one, for whom, and whether it is online, its user says."""
NEVER_SWEPT = ("hydra", "paths", "logger", "allow")
SERVERS = ("engine.base_url", "evaluation.base_url", "judge.base_url", "rollouts.base_url")
"""Where servers answer, to which rows and templates are sent: of no file, nor of a word that a file holds."""
AT_LEAST_ONE = ("n_jobs", "n_trials", "max_batch_size", "nodes", "tasks_per_node", "cpus_per_task", "timeout_min")
LARGEST_NUMBER = 1_000_000
"""Of the launcher's and the sweeper's."""

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
        children = (
            node.value if isinstance(node, yaml.SequenceNode) else [child for pair in node.value for child in pair]
        )
        sizes[id(node)] = 1 + sum(_written_out(child, sizes, where) for child in children)
    size = sizes[id(node)]
    if size is None:
        raise UserError(f"{where}: an alias that holds itself")
    if size > MOST_NODES:
        raise UserError(f"{where}: its aliases stand for more than {MOST_NODES:,} values")
    return size


_GROUP = re.compile(r"\s*((override|optional)\s+)*/?")
_CHOSEN = ("hydra/launcher", "hydra/sweeper")
"""Groups of Hydra's own of which a file may choose an option."""


def check_defaults(defaults: Any, where: str) -> None:
    """A defaults list names options that lie within the search path, by plain words or by the choice of a group."""
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        for text in _strings(entry):
            if any(part == ".." for part in re.split(r"[/\\]", text.split("@")[0])):
                raise UserError(f"{where}: the defaults list leaves its folder ({text})")
            if re.match(r"(_global_\.)?hydra\b", text.partition("@")[2]):
                raise UserError(f"{where}: the defaults list puts {text} under hydra, which a config file may not")
            group = _GROUP.sub("", text.partition("@")[0], count=1)
            if group.startswith("hydra/") and group not in _CHOSEN:
                raise UserError(f"{where}: the defaults list chooses {group}, which a config file may not")
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
        elif key == "logger":
            _check_logger(value, where)
        elif key == "allow":
            raise UserError(f"{where}: allow={value} is not a config file's to set; say it on the command line")
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


def _check_logger(logger: Any, where: str) -> None:
    for key, value in logger.items() if isinstance(logger, dict) else [("", logger)] if logger else []:
        if key not in TRACKED:
            raise UserError(f"{where}: logger.{key}={value} is not a config file's to set; say it on the command line")
        _check_value(value, f"logger.{key}", where)


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
                for option, number in setting.items():
                    if option != "_target_" and not _is_moderate(str(option), number):
                        raise _not_allowed(f"{place}.{option}", number, where)
            elif place == "sweeper.direction" and _words(setting):
                continue
            elif not (_LAUNCHER_WORD.fullmatch(str(name)) and (setting is None or _is_moderate(name, setting))):
                raise _not_allowed(place, setting, where)


def _is_moderate(name: str, value: Any) -> bool:
    """A switch, or a number that a launcher or sweeper can be given; `n_jobs: -1` stands for all processors."""
    if isinstance(value, bool) or (name == "n_jobs" and value == -1):
        return isinstance(value, bool | int) and not (isinstance(value, bool) and name in AT_LEAST_ONE)
    return isinstance(value, int | float) and int(name in AT_LEAST_ONE) <= value <= LARGEST_NUMBER


def _words(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str) and re.fullmatch(r"[\w.]+", item) for item in items)


def _check_swept(params: dict[Any, Any], where: str) -> None:
    """Settings of this project and what they are swept over. These words become overrides, so they call nothing."""
    for key, value in params.items():
        if not (isinstance(key, str) and _SWEPT.fullmatch(key)) or _is_the_users(key):
            raise _not_allowed(f"sweeper.params.{key}", value, where)
        if ".." in f"{key}={value}":
            raise UserError(f"{where}: hydra.sweeper.params.{key}={value} leaves the search path; refused")
        if isinstance(value, dict | list) or "$" in str(value) or not str(value).isprintable():
            raise UserError(f"{where}: hydra.sweeper.params.{key}={value} must be plain choices, such as 1,2,3")


def check_words(overrides: Iterable[str], where: str) -> None:
    """Refuse overrides of a file that say more than a config file may: settings and choices of this project's."""
    for override in overrides:
        key, separator, _ = override.partition("=")
        bare = key.lstrip("+~")
        if not (_SWEPT.fullmatch(bare) and (separator or key.startswith("~")) and len(override) <= LONGEST_WORD):
            raise UserError(f"{where}: {override[:80]!r} is no override; refused")
        if _is_the_users(bare, "store", "dry_run", "fetch") or any(sign in override for sign in ("$", "..")):
            raise UserError(f"{where}: {override[:80]} is not a config file's to set; say it on the command line")
        if not override.isprintable():
            raise UserError(f"{where}: {override[:80]!r} holds control characters; refused")


def _is_the_users(key: str, *groups: str) -> bool:
    """Whether only a person's own command line may set a key; `groups` are more of which that holds."""
    return re.split(r"[./@]", key)[0] in (*NEVER_SWEPT, *groups) or key in SERVERS


def check_jobs(params: Mapping[Any, Any], all_combined: bool) -> None:
    """Refuse a sweep of more jobs than anybody wants, before its choices are written out."""
    jobs = 1.0
    for key, value in params.items():
        number = _choices(str(key), str(value), all_combined)
        jobs = max(jobs * number if all_combined else number, 1)
        if not jobs <= MOST_JOBS:
            raise UserError(f"hydra.sweeper.params.{key}={str(value)[:80]} makes more than {MOST_JOBS:,} jobs")


@lru_cache(maxsize=1024)
def _choices(key: str, value: str, all_combined: bool) -> float:
    """How many values a setting is swept over; every job's config says it again."""
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
    except HydraException as error:
        raise UserError(f"hydra.sweeper.params.{key}: {str(error).splitlines()[0]}") from None
    swept = override.value()
    if isinstance(swept, IntervalSweep) and all_combined:
        raise UserError(f"hydra.sweeper.params.{key}={value} is no list of choices, such as 1,2,3")
    if isinstance(swept, RangeSweep):
        start, stop, step = (float(part or 0) for part in (swept.start, swept.stop, swept.step))
        return abs(stop - start) / abs(step) if step else math.inf
    return len(swept.list) if isinstance(swept, ChoiceSweep) else 1


def _not_allowed(key: str, value: Any, where: str) -> UserError:
    name = ".".join(part for part in ("hydra", key) if part)
    return UserError(f"{where}: {name}={value} is not a config file's to set; give it on the command line")
