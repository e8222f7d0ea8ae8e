"""What there is to choose: `sdd explain`, `sdd explain GROUP`, `sdd explain SETTING`.

Descriptions, types and defaults are those of the schema, bounds those of its checks, options the files of `conf/` with
their first sentence, and what a setting changes is found by changing it (`influence.py`).
"""

import argparse
import re
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdd.cli.config_files import config_folder
from sdd.cli.mistakes import advice
from sdd.config.checks import AT_LEAST, AT_MOST, CHOICES, POSITIVE, SHARES_ABOVE_0, WITHIN
from sdd.config.settings import Setting, descriptions, keys, setting
from sdd.errors import UserError
from sdd.untrusted import tell_error

WIDTH = 118
GLOBAL = {
    "settings": "defaults that fit a kind of model; public models choose theirs",
    "experiment": "whole studies, which set the other groups",
}
"""Groups whose options set other groups."""


def options_of(group: str) -> dict[str, str]:
    """Every option of a group of this project's, with the first sentence of its file."""
    folder = config_folder() / group
    files = sorted(folder.rglob("*.yaml"))
    return {str(path.relative_to(folder).with_suffix("")): first_sentence(path.read_text()) for path in files}


def first_sentence(text: str) -> str:
    """The first sentence of the comment that a file begins with."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# ").rstrip())
    words = re.split(r"(?<=[^A-Z0-9.][.:])\s+(?=[A-Z(h])|(?<=\d[.])\s+(?=[A-Z])", " ".join(lines), maxsplit=1)[0]
    return words.rstrip(".:")


def bounds(key: str, own: Setting) -> str:
    """What a value must be, in words."""
    if key in CHOICES:
        return f"one of {', '.join(CHOICES[key])}"
    words = own.expected
    if key in AT_LEAST:
        words = words.replace("a whole number", f"a whole number of at least {AT_LEAST[key]}")
    if key in AT_MOST:
        words += f", at most {AT_MOST[key]:,}"
    if key in POSITIVE:
        words = words.replace("a number", "a number above 0")
    if key in SHARES_ABOVE_0:
        words = words.replace("a number", "a number above 0, at most 1")
    if key in WITHIN:
        low, high = WITHIN[key]
        words = words.replace("a number", f"a number from {low:g} to {high:g}")
    return words


def shown(value: Any) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def explain_all() -> Iterator[str]:
    """A line a group: what it is, how many options it has."""
    texts = descriptions() | GLOBAL
    for name in (key for key in texts if "." not in key):
        count = len(options_of(name))
        yield f"{name:<13} {texts[name]}{f' ({count} options)' if count else ''}"
    yield ""
    yield "more: sdd explain GROUP, sdd explain GROUP.SETTING"


def explain_group(name: str, default: DictConfig, influenced: list[str]) -> Iterator[str]:
    texts, options = descriptions() | GLOBAL, options_of(name)
    yield f"{name}: {texts[name]}"
    if options:
        yield f"options ({name}=...):"
        widest = max(map(len, options))
        for option, what in options.items():
            yield from _wrapped(f"  {option:<{widest}}  ", what)
    node = default.get(name)
    inner = [
        key for key in keys() if key.startswith(f"{name}.") and key.count(".") == 1 and not key.endswith("._target_")
    ]
    inner = inner or [f"{name}.{key}" for key in node or [] if key != "_target_"]
    if inner:
        yield "settings:"
        widest = max(map(len, inner))
        for key in inner:
            yield from _wrapped(
                f"  {key:<{widest}}  ", f"{texts.get(key, '')} [{shown(OmegaConf.select(default, key))}]".strip()
            )
    if options and name not in GLOBAL:
        yield _changes("the choice", influenced)


def explain_setting(key: str, default: DictConfig, influenced: list[str]) -> Iterator[str]:
    own, texts = setting(key), descriptions()
    yield f"{key}: {texts.get(key, 'a setting of the chosen option')}"
    if own is not None and not own.is_group:
        yield from _wrapped("  must be  ", bounds(key, own))
    yield f"  default  {shown(OmegaConf.select(default, key))}"
    yield "  " + _changes("it", influenced)


def _changes(what: str, stages: list[str]) -> str:
    return f"{what} changes no artifact" if not stages else f"{what} changes: {', '.join(stages)}"


def _wrapped(before: str, text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=before, subsequent_indent=" " * len(before)) or [before.rstrip()]


def explained(name: str | None) -> Iterator[str]:
    """The lines about a group or a setting; about all groups for None."""
    if name is None:
        yield from explain_all()
        return
    from sdd.cli.influence import Influence

    known = {*keys(), *GLOBAL}
    with tempfile.TemporaryDirectory() as temporary:
        influence = Influence(Path(temporary))
        default = influence.defaults
        group, _, _ = name.partition(".")
        if name not in known and OmegaConf.select(default, name) is None:
            raise UserError(f"{name} is no group or setting; {advice(name, sorted(known), 'see one of')}")
        own = setting(name)
        if name in GLOBAL or (name == group and own is not None and (own.is_group or options_of(name))):
            tried = [] if name in GLOBAL else list(options_of(name))
            yield from explain_group(name, default, influence.of_group(name, tried))
        else:
            yield from explain_setting(name, default, influence.of_setting(name))


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sdd explain", description="What there is to choose, and what it changes.")
    parser.add_argument("name", nargs="?", metavar="GROUP|SETTING", help="for example pruning, or finetune.noise_share")
    name = parser.parse_args(words).name
    try:
        for line in explained(name):
            print(line)
    except UserError as error:
        return tell_error(error)
    return 0
