"""Mistakes that are noticed when a config is put together, each in one line with the nearest names.

Hydra says what it could not do, over some lines, and advises what would not help (`+key=...`). Here each word is looked
at on its own: is it an override, does its group have the option, is there such a setting, is the value of its type?
Only where every word passes are Hydra's own words told.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdd.config.settings import keys, setting

PLUGINS = {
    "hydra/launcher=submitit_slurm": "hydra-submitit-launcher",
    "hydra/launcher=submitit_local": "hydra-submitit-launcher",
    "hydra/sweeper=optuna": "hydra-optuna-sweeper",
}
"""Options that a package of its own brings."""
SEEN = 12
"""Names that a line lists at most."""


def nearest(name: str, names: Iterable[str], most: int = 3, alike: float = 0.7) -> list[str]:
    """The names that were probably meant: spelt alike, by their initials (lr), or what stands after a slash or dot."""
    plain = {own.lower().replace("-", "_"): own for own in names}
    asked = name.lower().replace("-", "_")
    last = re.split(r"[./]", asked)[-1]
    exact = [own for key, own in plain.items() if asked == key or re.split(r"[./]", key)[-1] == last]
    if exact:
        return exact[:most]
    initials = [own for key, own in plain.items() if _initials(key) == last]
    close = [plain[key] for key in difflib.get_close_matches(asked, plain, most, alike)]
    return list(dict.fromkeys([*(initials if len(last) > 1 else []), *close]))[:most]


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _initials(key: str) -> str:
    return "".join(part[0] for part in re.split(r"[./]", key)[-1].split("_") if part)


def advice(name: str, names: Iterable[str], verb: str = "choose one of") -> str:
    """ "did you mean x?", or the names there are."""
    names = list(names)
    if close := nearest(name, names):
        return f"did you mean {' or '.join(close)}?"
    more = f", ... ({len(names)} in all)" if len(names) > SEEN else ""
    return f"{verb} {', '.join(names[:SEEN])}{more}"


def flag_mistake(message: str, words: Sequence[str], flags: Sequence[str]) -> str:
    """What argparse says of a flag, in one line; a setting that was typed like a flag is shown as one."""
    if not message.startswith("unrecognized arguments"):
        return message
    word = next(word for word in words if word.startswith("-") and word in message)
    name, _, value = word.lstrip("-").partition("=")
    meant = nearest(name, keys(), 1)
    close = [flag for flag in difflib.get_close_matches(f"--{name}", flags, 1, 0.7) if flag.startswith("--")]
    if close and not (meant and _likeness(name, meant[0]) >= _likeness(f"--{name}", close[0])):
        return f"{word} is no flag; did you mean {close[0]}?"
    if meant:
        own = setting(meant[0])
        example = "true" if own is not None and own.type is bool else "..."
        return f"{word} is no flag; settings are written without dashes: {meant[0]}={value or example}"
    return f"{word} is no flag; choose one of {', '.join(flag for flag in flags if flag.startswith('--'))}"


@dataclass
class Composition:
    """What a mistake is looked for in: the groups, their options, and the rest of the config without its words."""

    is_group: Callable[[str], bool]
    options: Callable[[str], list[str]]
    composed: Callable[[list[str]], DictConfig]
    is_sweep: bool

    def mistake(self, words: list[str]) -> str | None:
        """The first word that is wrong on its own; None where none is."""
        parsed: list[Override] = []
        for word in words:
            try:
                parsed.append(OverridesParser.create().parse_override(word))
            except HydraException:
                return _not_read(word)
        for override in parsed:
            if line := self._of_group(override):
                return line
        groups = [override.input_line for override in parsed if self._chooses(override)]
        config = self.composed([word for word in groups if word is not None])
        return next((line for override in parsed if (line := self._of_setting(override, config))), None)

    def _chooses(self, override: Override) -> bool:
        if override.is_sweep_override():
            return False
        return self.is_group(override.key_or_group) and not isinstance(override.value(), dict)

    def _of_group(self, override: Override) -> str | None:
        key = override.key_or_group
        if override.is_sweep_override() and not self.is_sweep:
            return _sweep_without_flag(override)
        if not self.is_group(key):
            return None
        if override.is_add() and override.package is None:
            value = str(override.input_line).partition("=")[2]
            return f"{override.input_line}: an option of {key} is chosen already; write {key}={value}"
        names = self.options(key)
        for value in _values(override):
            if value is None or isinstance(value, dict) or (override.is_delete() and value == ""):
                continue
            for one in value if isinstance(value, list) else [value]:
                if one not in names and (package := PLUGINS.get(f"{key}={one}")):
                    return f"{key}={one} needs the package {package}; run: pip install {package}"
                if one not in names:
                    return f"{key} has no option {one}; {_meant(key, str(one), names)}"
        return None

    def _of_setting(self, override: Override, config: DictConfig) -> str | None:
        if self.is_group(override.key_or_group) and not any(isinstance(own, dict) for own in _values(override)):
            return None
        key, word = override.key_or_group, override.input_line
        node: Any = config
        parts = key.split(".")
        for number, part in enumerate(parts):
            if isinstance(node, ListConfig) or not isinstance(node, DictConfig) or node._is_none():
                return None if override.is_add() or override.is_force_add() else _no_part(key, parts[:number])
            if part not in node:
                if override.is_add() or override.is_force_add():
                    return None
                return _no_setting(parts, number, [str(name) for name in node], config)
            node = node._get_node(part)
        if override.is_delete():
            return None
        for value in _values(override):
            shown = value if override.is_sweep_override() else str(word).partition("=")[2]
            if line := _wrong_type(config, key, value, shown):
                return line
        return None


def _values(override: Override) -> list[Any]:
    if not override.is_sweep_override():
        return [override.value()]
    swept = override.value()
    if not isinstance(swept, ChoiceSweep):
        return []
    return [Override._convert_value(value) for value in swept.list if not isinstance(value, Glob)]


def _sweep_without_flag(override: Override) -> str:
    key, _, value = str(override.input_line).partition("=")
    own = setting(key)
    one_list = own is not None and own.expected.startswith("a list") and isinstance(override.value(), ChoiceSweep)
    otherwise = f", or write one list: {key}=[{value}]" if one_list else ""
    return f"{key}={value} names several values; add -m to run each of them{otherwise}"


def _meant(group: str, value: str, names: list[str]) -> str:
    if group in ("dataset", "calibration") and re.match(r"[~/.]|.*\.(jsonl?|parquet|gz)$", value):
        return f"did you mean {group}=local {group}.path={value}?"
    within = [name for name in names if name.startswith(f"{value}/")]
    line = f"choose one of {', '.join(within)}" if within else advice(value, names)
    if group == "model" and not line.startswith("did"):
        return f"{line}; or name a hub id (organisation/name) or a folder (./name)"
    return line


def _no_part(key: str, before: list[str]) -> str:
    return f"{key} is not a setting; {'.'.join(before)} holds a value of its own"


def _no_setting(parts: list[str], number: int, names: list[str], config: DictConfig) -> str:
    """A key whose part `number` is none of the `names` there: those nearest, else settings of that name elsewhere."""
    key, before, after = ".".join(parts), parts[:number], parts[number + 1 :]
    names = [name for name in names if name not in ("hydra", "_target_")]
    meant = [".".join([*before, name, *after]) for name in nearest(parts[number], names)]
    meant = meant or nearest(parts[-1], [*keys(), *_dotted(config)], alike=0.8)
    if meant:
        return f"{key} is not a setting; did you mean {' or '.join(meant)}?"
    if not names:
        return f"{key} is not a setting of the chosen {'/'.join(before)}"
    return f"{key} is not a setting; choose from {', '.join('.'.join([*before, name]) for name in names)}"


def _dotted(node: DictConfig, before: str = "") -> list[str]:
    keys: list[str] = []
    for name in map(str, node):
        if not before and name == "hydra":
            continue
        child = node._get_node(name)
        keys.append(f"{before}{name}")
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            keys += _dotted(child, f"{before}{name}.")
    return keys


def _wrong_type(config: DictConfig, key: str, value: Any, shown: Any) -> str | None:
    try:
        OmegaConf.update(config.copy(), key, value, merge=True)
    except OmegaConfBaseException as error:
        own = setting(key)
        if own is None:
            return f"{key}={shown}: {str(error).splitlines()[0]}"
        if isinstance(value, dict) and own.is_group:
            unknown = next((name for name in value if name not in config[key]), None)
            if unknown is not None:
                parts = [*key.split("."), str(unknown)]
                return _no_setting(parts, len(parts) - 1, [str(name) for name in config[key]], config)
            return f"{key}={shown}: {str(error).splitlines()[0]}"
        example = f": {key}=[{shown}]" if own.expected.startswith("a list") and isinstance(value, str | int) else ""
        return f"{key}={shown} must be {own.expected}{example}"
    return None


def _not_read(word: str) -> str:
    """A word that Hydra's grammar does not read."""
    key, separator, value = word.partition("=")
    if not separator:
        name, _, given = word.partition(":")
        shown = f"{name.strip()}={given.strip() or '...'}"
        return f"{word} is not a setting; write key=value without spaces, for example {shown}"
    if key != key.strip() or not key:
        return f"{word}: no space may stand before the equals sign; write {key.strip() or 'key'}={value.strip()}"
    for opening, closing in ("[]", "{}", "()"):
        if value.count(opening) != value.count(closing):
            return f"{word}: {opening} and {closing} do not match"
    if value.endswith(",") or ",," in value or value.startswith(","):
        return f"{word}: a value is missing beside a comma"
    if value.count("'") % 2 or value.count('"') % 2:
        return f"{word}: a quote is not closed"
    if not re.fullmatch(r"~?[+]{0,2}[\w.@/:-]+", key):
        return f"{word} is not a setting; {key} is no name of one"
    return f"{word} cannot be read; put the value in quotes within quotes: \"{key}='...'\""


def hydras_words(error: Exception) -> str:
    """What Hydra says itself, in one line, without advice on search paths and `+`."""
    if isinstance(error, MissingConfigException) and error.options is not None and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        where = str(error).partition(":")[0] + ": " if str(error).startswith("In '") else ""
        return f"{where}{group} has no option {option}; {advice(option, error.options)}"
    text = str(error).partition("Config search path:")[0].partition("To append to your ")[0]
    cause = (str(error.__cause__ or "").splitlines() or [""])[0]
    return " ".join(f"{text} {cause}".split())
