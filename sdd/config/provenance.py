"""What an artifact's manifest says of the job that built it: its command and its composed config, fit to be shared.

Nothing of the machine or its owner is in it. Only settings that the config's schema knows are kept, and of them none
that say where things are put or who tracks them; of what a schema leaves open, only what is named here. In what is kept
absolute paths keep their last part, and what looks like a credential, or was typed under a setting that is left out, is
replaced. Never part of a key. Knows nothing of what the settings mean.
"""

import contextlib
import math
import re
import shlex
import types
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Union, get_args, get_origin

from sdd.config.schema import Config, hints_of
from sdd.config.shared import SERVERS

LEFT_OUT = ("paths", "logger", "store", "dry_run", "fetch", "study")
"""Settings that say where and by whom, not what; `study` holds what other settings refer to, which have the values."""
CRITERION = ("by", "depth", "contiguous", "keep_final", "seed", "num_texts", "alpha", "temperature", "first_cut")
ENGINE = (
    *("batch_size", "max_new_tokens", "max_prompt_tokens", "temperature", "top_p", "tries", "seed"),
    *("model", "endpoint", "concurrency", "retries", "timeout"),
)
OPEN = {"metric": CRITERION, "width_metric": CRITERION, "engine": ENGINE}
"""Nodes for which the schema names no settings, and those of them that are kept, besides `_target_`."""
FIELDS = ("prompt", "reference", "id", "answer", "messages", "system")
"""Columns of `dataset.fields`."""
GONE = "***"
PACKAGE = Path(__file__).resolve().parent

SECRET_WORDS = {"token", "secret", "secrets", "password", "passwd", "pwd", "passphrase", "credential", "credentials"}
SECRET_WORDS |= {"bearer", "auth", "authorization", "authorisation", "apikey", "cookie"}
SECRET_KEYS = {"api", "access", "private", "secret", "ssh", "signing", "encryption", "account"}
"""What makes a key a secret one: `api_key`, `accessKey`."""

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_PLAIN = re.compile(r"[\w.-]{1,40}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KNOWN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_|sk-|pk-|rk_|gh[opsur]_|github_pat_|glpat-|xox[abeprs]-|AKIA|ASIA|AIza|ya29\.|npm_|pypi-"
    r"|wandb_|eyJ)[\w.~+/=-]{8,}"
)
_LONG = re.compile(r"[\w+/=-]{32,}")
_NAMED = re.compile(r"([A-Za-z][\w.-]*)(['\"]?\s*[=:]\s*)(?:(?:Bearer|Basic)\s+)?(\"[^\"]*\"|'[^']*'|[^\s,;&\]}'\"]+)")
_USER = re.compile(r"(?<=://)[^\s/@]+@")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?|true|false|null", re.IGNORECASE)

_ROOT = r"(?:file:/*(?=/)|)(?:/+|~[\w.-]*[/\\]+|[A-Za-z]:[/\\]+|\\\\(?=\w))"
_PART = r"[^\s/\\,;:'\"\[\](){}<>|=]+"
_WHOLE = re.compile(r"['\"]?(?:/|~|[A-Za-z]:[/\\]|\\\\|file:/)[^\n{,=]*[/\\]\S")
_QUOTED = re.compile(rf"(['\"])(?={_ROOT})([^'\"\n]*[/\\][^'\"\n]*)\1")
_WITHIN = re.compile(
    rf"(?P<url>(?<!\w)(?!file:)[A-Za-z][A-Za-z\d+.-]+://[^\s'\"]*)"
    rf"|(?<![\w./\\}}~])(?P<path>{_ROOT}{_PART}(?:[/\\]+{_PART})+[/\\]*|(?:~[\w.-]*|[A-Za-z]:)[/\\]+{_PART})"
)


def provenance(script: str, overrides: Iterable[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """`command` (a line for a shell) and `config` (plain values) of a job."""
    overrides = list(overrides)
    typed = [*_secrets(config), *(value for word in overrides for value in _values_left_out(word))]
    kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
    return {"command": command(script, overrides), "config": _kept(kept, Config, "", typed)}


def command(script: str, overrides: Iterable[str]) -> str:
    return " ".join([f"python {script}.py", *map(shlex.quote, shared_words(overrides))])


def shared_words(overrides: Iterable[str]) -> list[str]:
    """The overrides that are kept, as they are kept."""
    overrides = list(overrides)
    typed = [value for word in overrides for value in _values_left_out(word)]
    return [shared for override in overrides if (shared := _shared_word(override, typed)) is not None]


def _word(key: str, value: str, typed: Iterable[str]) -> str | None:
    """The value of an override as it is kept; None where it is not."""
    bare = key.lstrip("+~")
    if bare.split(".")[-1].endswith("revision") and _COMMIT.fullmatch(value.strip("'\"")):
        return value
    shared = str(shareable(value, typed))
    if bare.startswith("study."):
        plain = all(_PLAIN.fullmatch(part.removeprefix(".../")) for part in shared.strip("'\"").split(","))
        return shared if plain and not is_secret(bare) else None
    return shared


def is_known(key: str) -> bool:
    """Whether an override's key is a setting, or a group, that is kept: `+dataset@analysis.prompts`, `~metric.by`."""
    group, _, package = key.lstrip("+~").partition("@")
    if group in ("experiment", "settings"):
        return not package
    if group.startswith("study."):
        return not package
    return _is_setting(group) and (not package or _is_setting(package))


def _is_setting(dotted: str) -> bool:
    names, kind, path = dotted.split("."), Config, ""
    if names[0] in LEFT_OUT:
        return False
    for name in names:
        path, kind = _below(path, name, kind)
        if kind is None:
            return False
    return True


def _below(path: str, name: str, kind: Any) -> tuple[str, Any]:
    """The path and the type of what lies in a node under a name; no type for what is not kept."""
    inner = f"{path}.{name}" if path else name
    if inner in SERVERS:
        return inner, None
    plain = _PLAIN.fullmatch(name) and not is_secret(name)
    if is_dataclass(kind):
        hint = hints_of(kind).get(name)
        parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        return inner, next((part for part in parts if part is not types.NoneType), None)
    if path in OPEN:
        return inner, Any if name in (*OPEN[path], "_target_") else None
    of_text = kind == dict[str, str]
    if of_text or get_origin(kind) is dict:
        return inner, get_args(kind)[1] if plain and (name in FIELDS or not of_text) else None
    return inner, Any if kind is Any and plain and path.startswith(("merge.t", "model.shape.")) else None


def _kept(value: Any, kind: Any, path: str, typed: Iterable[str]) -> Any:
    """The value without what its type, or `OPEN`, does not name."""
    if isinstance(value, Mapping):
        kept = {}
        for key, item in value.items():
            where, below = _below(path, str(key), kind)
            if below is not None or _is_of_criterion(where, item):
                kept[str(key)] = _kept(item, below, where, typed)
        return kept
    if path == "merge.students" and isinstance(value, list):
        return [
            [w for override in overrides if (w := _shared_word(str(override), typed)) is not None]
            for overrides in value
        ]
    if path.endswith("revision") and isinstance(value, str) and _COMMIT.fullmatch(value):
        return value
    return shareable(value, typed)


def _shared_word(override: str, typed: Iterable[str]) -> str | None:
    key, separator, value = override.partition("=")
    number = _NUMBER.fullmatch(value) is not None and _is_of_criterion(key.lstrip("+"), 0)
    shared = _word(key, value, typed) if number or is_known(key) else None
    return None if shared is None else f"{key}{separator}{shared}"


def _is_of_criterion(path: str, value: Any) -> bool:
    """Whether a setting is a number of a criterion's, which may be the user's own and have names of its own."""
    node, _, name = path.partition(".")
    plain = _PLAIN.fullmatch(name) is not None and "." not in name and not is_secret(name)
    return node in ("metric", "width_metric") and plain and isinstance(value, bool | int | float)


def _values_left_out(override: str) -> list[str]:
    """What was typed under a setting that is not kept, if it is long enough to be told from other words."""
    key, _, value = override.partition("=")
    value = value.strip("'\"")
    group = key.lstrip("+~").split(".")[0]
    if not is_secret(key) and (is_known(key) or group in LEFT_OUT or group.startswith("hydra")):
        return []
    return [value] if len(value) >= 6 and not _NUMBER.fullmatch(value) else []


def _secrets(node: Any, secret: bool = False) -> list[str]:
    """Text under a name of a credential anywhere in a config, to which other settings may refer."""
    if isinstance(node, Mapping):
        return [text for key, item in node.items() for text in _secrets(item, secret or is_secret(str(key)))]
    if isinstance(node, list | tuple):
        return [text for item in node for text in _secrets(item, secret)]
    return [node] if secret and isinstance(node, str) and len(node) >= 6 else []


def is_secret(name: str) -> bool:
    """Whether a setting is named like a credential: `hfToken`, `engine.api_key`; not `max_new_tokens`."""
    words = [word.lower() for word in _WORD.findall(name)]
    return bool(SECRET_WORDS & set(words)) or any(
        first in SECRET_KEYS and second in ("key", "keys") for first, second in pairwise(words)
    )


def shareable(value: Any, typed: Iterable[str] = ()) -> Any:
    """The value without absolute paths and credentials, containers included; `typed` is what must not be in it."""
    if isinstance(value, Mapping):
        return {str(shareable(str(k))): shareable(v, typed) for k, v in value.items() if not is_secret(str(k))}
    if isinstance(value, list | tuple):
        return [shareable(item, typed) for item in value]
    if isinstance(value, str):
        return _text(value, typed)
    return value if value is None or isinstance(value, bool | int | float) else _text(str(value), typed)


def _text(text: str, typed: Iterable[str]) -> str:
    for secret in typed:
        text = text.replace(secret, GONE)
    text = _KNOWN.sub(GONE, _USER.sub("", text))
    text = _LONG.sub(lambda match: GONE if _is_random(match[0]) else match[0], text)
    text = _NAMED.sub(_named, text)
    if _WHOLE.match(text) and (bare := text.strip("'\"")) not in _places():
        return f".../{_name(bare)}"
    for place in _places():
        text = re.sub(rf"{re.escape(place)}(?![\w.-])((?:[/\\]+{_PART})*)", _below_place, text)
    text = _QUOTED.sub(lambda match: f"{match[1]}.../{_name(match[2])}{match[1]}", text)
    return _WITHIN.sub(lambda match: match["url"] or f".../{_name(match['path'])}", text)


def _named(match: re.Match[str]) -> str:
    """A setting within a text: `api_key=...` keeps its name; `max_tokens=4`, and a template's `token: {x}`, all."""
    name, sign, value = match.groups()
    if is_secret(name) and not _NUMBER.fullmatch(value) and not value.startswith("{"):
        return f"{name}{sign}{GONE}"
    return f"{name}{sign}{_NAMED.sub(_named, value)}"


def _below_place(match: re.Match[str]) -> str:
    return f".../{_name(match[1])}" if match[1] else "..."


def _is_random(text: str) -> bool:
    """Whether 32 characters or more are digits of a key rather than words: hexadecimal, or base 64."""
    if re.fullmatch(r"[0-9a-fA-F-]+", text):
        return bool(re.search(r"\d", text)) and len(set(text)) >= 6
    kinds = sum(bool(re.search(pattern, text)) for pattern in ("[a-z]", "[A-Z]", r"\d"))
    frequencies = Counter(text)
    bits = -sum(n / len(text) * math.log2(n / len(text)) for n in frequencies.values())
    return kinds == 3 and bits > (3.9 if text.rstrip("=").isalnum() else 4.4)


def _name(path: str) -> str:
    kind = PureWindowsPath if "\\" in path or re.match(r"[A-Za-z]:", path) else PurePath
    return kind(path).name


def _places() -> list[str]:
    """Folders of this machine that a value may hold in any form, the longest first."""
    folders = {str(Path.home()), str(PACKAGE), str(PACKAGE.parent)}
    with contextlib.suppress(OSError):  # deleted under this process
        folders.add(str(Path.cwd()))
    return sorted((place for place in folders if len(place) > 4), key=len, reverse=True)
