"""The students that `merge.students` and `pruning.after` name: lists of overrides, composed by Hydra over those of the
command line.

A student's config is the one that `train.py` would have with these overrides and no merge, so that it is the same work.
It passes the same checks as every config: the allow-list in Hydra's loader, then `check_values`. Where and how things
run is said once, for the whole command.
"""

import re
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import yaml
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdd.config import check_values
from sdd.config.shared import SERVERS
from sdd.errors import UserError

COMPOSING: ContextVar[bool] = ContextVar("composing a student", default=False)
"""Whether a job composes a student, whose mistakes are the job's."""

NOT_OF_A_STUDENT = (
    *("hydra", "merge", "evaluation", "trainer", "logger", "paths", "store", "dry_run", "fetch", "allow"),
)
"""Groups that say nothing of how a student is made."""


AFTER = "pruning.after"


def quoted(word: str) -> str:
    """A word of the command line, with quotes around every override within `merge.students` or `pruning.after`, as
    Hydra needs them.

    `merge.students=[[dataset=tiny_math],[seed=1]]` and `pruning.after=[pruning=n2]` read as one would write them in a
    YAML file. Any other word, and what is no list (of lists) there, is left to Hydra.
    """
    key, separator, value = word.partition("=")
    if not separator or key.lstrip("+") not in ("merge.students", AFTER):
        return word
    try:
        choices = yaml.safe_load(f"[{value}]")
    except yaml.YAMLError:
        return word
    are_read = all(map(_is_student if key.lstrip("+") == AFTER else _are_students, choices))
    return f"{key}={','.join(map(_written, choices))}" if are_read else word


def _are_students(choice: Any) -> bool:
    return isinstance(choice, list) and all(isinstance(overrides, list) for overrides in choice)


def _is_student(choice: Any) -> bool:
    return choice is None or (isinstance(choice, list) and all(isinstance(override, str) for override in choice))


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return str(QuotedString(text=str(value), quote=Quote.single).with_quotes())


def composed_students(config: DictConfig) -> list[tuple[DictConfig, list[str]]]:
    """Each student's config, checked, and the overrides that make it; none without a merge. Call it within a job."""
    if config.merge.method == "none":
        return []
    words = HydraConfig.get().overrides.task
    return [
        _composed(words, list(overrides), f"merge.students[{n}]") for n, overrides in enumerate(config.merge.students)
    ]


def composed_before(config: DictConfig, words: Sequence[str]) -> tuple[DictConfig, list[str]] | None:
    """The config, checked, of the student that a config cuts further, and the overrides that make it; None for none.

    `words` are those of the config itself. Call it within a job.
    """
    if config.pruning.after is None:
        return None
    kept = [word for word in words if word.lstrip("+~").partition("=")[0] != AFTER]
    return _composed([*kept, f"{AFTER}=null"], list(config.pruning.after), AFTER)


def _composed(given: Sequence[str], added: list[str], where: str) -> tuple[DictConfig, list[str]]:
    hydra_config = HydraConfig.get()
    overrides = list(map(quoted, added))
    words = [*(word for word in given if _group(word) != "merge"), *overrides]
    within = COMPOSING.set(True)
    searched = [word for word in hydra_config.overrides.hydra if word.startswith("hydra.searchpath=")]
    try:
        for override in OverridesParser.create().parse_overrides(overrides):
            if "${" in str(override.input_line):
                raise UserError(f"{override.input_line} would be resolved a second time; write the value itself")
            if _group(override.key_or_group) in NOT_OF_A_STUDENT or override.key_or_group in SERVERS:
                raise UserError(f"{override.input_line} says nothing of a student; give it for the whole command")
        config: DictConfig = compose(hydra_config.job.config_name, [*searched, *words, "merge=none"])
        OmegaConf.resolve(config)
        check_values(config)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    finally:
        COMPOSING.reset(within)
    return config, words


def _group(override: str) -> str:
    return str(re.split(r"[./@=]", override.lstrip("+~"))[0])
