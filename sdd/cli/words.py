"""What people type, as Hydra reads it: flags first, text in quotes where its grammar needs them, models by their name.

`arranged` sees the words of the process, before Hydra's grammar does. `chosen` sees the overrides of one composition,
those of a sweep's job too: a hub id, a folder or a share stands there for the option and the settings that it means, so
that it leads to the same artifacts.
"""

import re
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from sdd.cli.mistakes import flag_mistake
from sdd.cli.students import quoted
from sdd.config.settings import setting
from sdd.errors import UserError

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
FOLDER = re.compile(r"[/~]|\.{1,2}(/|$)")
"""How a folder begins that is told from an option by it."""
OUTSIDE_QUOTES = re.compile(r",(?=(?:[^']*'[^']*')*[^']*$)")
"""The commas of a sweep, between its values."""
NAMED = ("model", "teacher")
"""What a model may be given to by its name, hub id or folder."""


def arranged(words: list[str]) -> list[str]:
    """The words of a command line in an order and with quotes that Hydra reads; `UserError` where a flag is none."""
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise UserError(flag_mistake(message, words, list(parser._option_string_actions)))

    parser.error = refuse  # type: ignore[assignment,method-assign]
    given = parser.parse_intermixed_args(words)
    commands = {
        "--run": given.run,
        "--multirun": given.multirun,
        "--cfg": given.cfg,
        "--info": given.info,
        "--shell-completion": given.shell_completion,
    }
    asked = [flag for flag, value in commands.items() if value]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} exclude each other; keep one")
    if given.resolve and not (given.cfg or given.help):
        raise UserError("--resolve goes with --cfg; add for example --cfg job")
    if given.config_dir is not None and not Path(given.config_dir).is_dir():
        raise UserError(f"--config-dir={given.config_dir}: no such folder")
    if given.shell_completion:
        return words
    flags = list(words)
    for override in given.overrides:
        flags.remove(override)
    is_sweep = given.multirun or "hydra.mode=MULTIRUN" in given.overrides
    return [*flags, *(_quoted(quoted(word), is_sweep) for word in given.overrides)]


def _quoted(word: str, is_sweep: bool) -> str:
    """The word, its value in quotes where it is text that Hydra's grammar does not read as such."""
    key, _, value = word.partition("=")
    own = setting(key.lstrip("+"))
    if not value or not (key in NAMED or (own is not None and own.type is str)) or _is_read(word, is_sweep):
        return word
    choices = OUTSIDE_QUOTES.split(value) if is_sweep else [value]
    return f"{key}={','.join(one if _is_read(f'{key}={one}', False) else in_quotes(one) for one in choices)}"


def _is_read(word: str, is_sweep: bool) -> bool:
    override = as_override(word)
    if override is None:
        return False
    if override.is_sweep_override():
        return is_sweep
    return not isinstance(override.value(), dict | list)


def command(script: str, words: Sequence[str]) -> str:
    """A command as it is typed here: of the program, which runs from any folder, or of a script beside this one."""
    program = f"sdd {script}" if Path(sys.argv[0]).name.startswith("sdd") else f"python {script}.py"
    return f"{program} {shlex.join(words)}"


def in_quotes(text: str) -> str:
    return str(QuotedString(text=text, quote=Quote.single).with_quotes())


def chosen(overrides: list[str], is_option: Callable[[str], bool], models: Path) -> list[str]:
    """The overrides of one composition, with a model's hub id or folder, and a share to keep, as what they stand for.

    `is_option` says whether the group `model` has an option; `models` is the folder of this project's own.
    """
    result: list[str] = []
    settings_chosen = any(word.startswith(("settings=", "experiment=")) for word in overrides)
    cut_chosen = any(word.startswith("pruning=") for word in overrides)
    for word in overrides:
        key = word.partition("=")[0]
        override = as_override(word) if key in (*NAMED, "pruning", "pruning.keep") else None
        value = None if override is None or override.is_sweep_override() else override.value()
        if key in NAMED and isinstance(value, str):
            result += _model(key, value, is_option, models, settings_chosen) or [word]
        elif key == "pruning" and isinstance(value, int | float) and not isinstance(value, bool):
            result += ["pruning=none", f"pruning.keep={value}"]
        elif key == "pruning.keep" and value is not None and not cut_chosen:
            result += ["pruning=none", word]
        else:
            result.append(word)
    return result


@lru_cache(maxsize=1024)
def as_override(word: str) -> Override | None:
    """A word as Hydra's grammar reads it, None where it does not; the jobs of a sweep repeat each other's words."""
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _model(key: str, name: str, is_option: Callable[[str], bool], models: Path, settings_chosen: bool) -> list[str]:
    """The overrides that a model's name, hub id or folder stands for; none where it is nothing of these."""
    is_hub_id = HUB_ID.fullmatch(name) is not None
    if key == "model" and (is_option(name) if is_hub_id else not FOLDER.match(name)):
        return []
    public = _public(models)
    option = next((own for own, (path, _) in public.items() if name in (own, path)), None)
    if key == "model" and option is not None:
        return [f"model={option}"]
    if option is not None:
        path, revision = public[option]
        return [f"teacher.path={in_quotes(path)}", f"teacher.revision={revision or 'null'}"]
    if not is_hub_id and not FOLDER.match(name):
        return []
    if key == "teacher":
        return [f"teacher.path={in_quotes(name)}"]
    settings = ["settings=public"] if is_hub_id and not settings_chosen else []
    return [*settings, "model=local", f"model.path={in_quotes(name)}"]


@cache
def _public(models: Path) -> dict[str, tuple[str, str | None]]:
    """By option: the hub id and the revision of every public model that this project ships a file for."""
    files = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(models.glob("*.yaml"))}
    public = {name: node for name, node in files.items() if HUB_ID.fullmatch(str(node["path"]))}
    return {name: (node["path"], node.get("revision")) for name, node in public.items()}
