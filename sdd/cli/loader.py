"""Hydra's config loader, which knows who said what: files are checked one by one, before they are put together.

Trusted are the command line, the code's own defaults (the schema, Hydra's, its plugins'), and this project's groups. An
experiment, and every file of a folder that somebody names, may say only what `shared_configs` allows. Files are read
within bounds and within their search path, and the composed config passes the allow-list before Hydra instantiates
anything, in every job of a sweep too. Hydra 1.4 takes the same list as `execution_whitelist`.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import GroupDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import sdd
from sdd.cli.mistakes import Composition, hydras_words
from sdd.cli.students import COMPOSING
from sdd.cli.words import chosen
from sdd.config import Config
from sdd.config.allowed import check_targets, name_own
from sdd.config.own import allow
from sdd.config.shared import LARGEST, check_defaults, check_jobs, check_shared, check_yaml
from sdd.errors import UserError
from sdd.untrusted import printable, read_text

PACKAGE = Path(sdd.__file__).resolve().parent
ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("package_folder", lambda sub: str(PACKAGE / sub), replace=True)
OmegaConf.register_new_resolver("process_id", lambda: str(os.getpid()), replace=True, use_cache=True)  # for workers too

SHARED = "experiment"
"""The group whose options are made to be passed on; they are nobody's own, wherever they lie."""

LONGEST_LINE = 2_000
"""Characters of a refusal: more than any of ours."""
MOST_FILES = 1_000
"""Files of a config, counted once for each place that names them; ours is made of some hundred."""

MOST_FOLDERS = 50
"""Folders of a group that are looked into for the names of its options, where a mistake is explained."""

Composed = TypeVar("Composed")


def config_folder() -> Path:
    """The one root of config groups: in the checkout, or installed beside the package."""
    beside, inside = PACKAGE.parent / "conf", PACKAGE / "conf"
    return beside if (beside / "config.yaml").is_file() else inside


class BoundedFileSource(FileConfigSource):
    """The YAML files of one folder: none outside it, none larger or deeper than a config can be."""

    def _place(self, config_path: str) -> Path:
        place = Path(os.path.realpath(Path(self.path) / config_path))
        if Path(config_path).is_absolute() or not place.is_relative_to(os.path.realpath(self.path)):
            raise UserError(f"{config_path} leads out of the config folder {self.path}; refused")
        return place

    def load_config(self, config_path: str) -> ConfigResult:
        name = self._normalize_file_name(config_path)
        text = read_text(self._place(name), name, LARGEST)
        check_yaml(text, name)
        try:
            result = super().load_config(config_path)
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise UserError(f"{name}{line}: not valid YAML ({error.problem})") from None
        except RecursionError:
            raise UserError(f"{name}: YAML that is nested too deeply") from None
        except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
            raise UserError(f"{name}: {(str(error).splitlines() or ['not valid YAML'])[0]}") from None
        if self.is_shared(config_path):
            if not isinstance(result.config, DictConfig):
                raise UserError(f"{name}: a config file holds settings by name (key: value)")
            check_defaults(_content(result).get("defaults", []), name)
        return result

    def is_shared(self, config_path: str) -> bool:
        own = Path(os.path.realpath(self.path)) == Path(os.path.realpath(config_folder()))
        return not own or Path(config_path).parts[0] == SHARED

    def is_group(self, config_path: str) -> bool:
        return self._place(config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        return self._place(self._normalize_file_name(config_path)).exists()


class CheckedRepository(ConfigRepository):
    """Hydra's sources, folders and packages, with bounds around the folders."""

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        for index, source in enumerate(self.sources):
            if source.scheme() == "file":  # Hydra loads its sources' module a second time, as another class
                self.sources[index] = BoundedFileSource(source.provider, source.path)


def is_shared(result: ConfigResult, config_path: str) -> bool:
    return result.path.startswith("file://") and BoundedFileSource("", result.path).is_shared(config_path)


class FilesOfOne(CachingConfigRepository):
    """The files of one composition: no more than a config is made of, and whether one of them is somebody else's."""

    def __init__(self, delegate: ConfigRepository) -> None:
        super().__init__(delegate)
        self.number, self.shared = 0, False

    def load_config(self, config_path: str) -> ConfigResult | None:
        self.number += 1
        if self.number > MOST_FILES:
            raise UserError(f"{config_path}: the defaults lists name more than {MOST_FILES:,} files; refused")
        result = super().load_config(config_path)
        self.shared = self.shared or (result is not None and is_shared(result, config_path))
        return result


def own_loader() -> "CheckedConfigLoader":
    """A loader of this project's own configs."""
    version.setbase("1.3")
    return CheckedConfigLoader(create_config_search_path(str(config_folder())))


class CheckedConfigLoader(ConfigLoaderImpl):
    """Hydra's loader; every composition passes here."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = _composed(lambda: CheckedRepository(config_search_path=config_search_path))
        self.files = FilesOfOne(self.repository)
        self.given: dict[str, Path] = {}
        """The files of folders that somebody named, which a composition has read, and the folder of each."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, **kwargs: Any
    ) -> DictConfig:
        def load() -> DictConfig:
            try:
                config = self._loaded(config_name, self._chosen(overrides), run_mode, **kwargs)
            except (HydraException, OmegaConfBaseException) as error:
                if _is_full_error():
                    raise
                raise UserError(self._mistake(config_name, overrides, run_mode) or hydras_words(error)) from None
            own = self._allowed(config)
            check_targets(config, own)
            name_own(config, own)
            if OmegaConf.select(config, "logger._target_") and not self._is_chosen(config, "logger"):
                raise UserError("a config file chooses logger, which it may not; say logger=... on the command line")
            sweeper = config.hydra.sweeper
            if sweeper.get("params"):
                check_jobs(sweeper.params, all_combined=sweeper._target_.endswith(".BasicSweeper"))
            return config

        return _composed(load)

    def _loaded(self, config_name: str | None, overrides: list[str], run_mode: RunMode, **kwargs: Any) -> DictConfig:
        config: DictConfig = super().load_configuration(config_name, overrides, run_mode, **kwargs)
        return config

    def _chosen(self, overrides: list[str]) -> list[str]:
        def is_option(name: str) -> bool:
            return bool(self.repository.config_exists(f"model/{name}"))

        return chosen(overrides, is_option, config_folder() / "model")

    def options(self, group: str) -> list[str]:
        """The options of a group, those in folders of its folder included: `paper/cell`."""
        names = list(self.repository.get_group_options(group, ObjectType.CONFIG))
        for folder in self.repository.get_group_options(group, ObjectType.GROUP)[:MOST_FOLDERS]:
            within = self.repository.get_group_options(f"{group}/{folder}", ObjectType.CONFIG)
            names += [f"{folder}/{name}" for name in within]
        return names

    def _mistake(self, config_name: str | None, overrides: list[str], run_mode: RunMode) -> str | None:
        """What is wrong with a word of the command line; None where that is not it."""

        def composed(words: list[str]) -> DictConfig:
            searched = [word for word in overrides if word.startswith("hydra.searchpath=")]
            return self._loaded(config_name, [*searched, *words], RunMode.MULTIRUN)

        is_sweep = run_mode == RunMode.MULTIRUN
        try:
            mistakes = Composition(self.repository.group_exists, self.options, composed, is_sweep)
            return mistakes.mistake(self._chosen(overrides))
        except (HydraException, OmegaConfBaseException):
            return None

    def _allowed(self, config: DictConfig) -> dict[str, str]:
        """The classes of the user's own that the command line allows, and the id of each."""
        typed = [word for word in config.hydra.overrides.task if re.match(r"\+*allow=", word)]
        if config.get("allow") is not None and not typed:
            raise UserError("a config file sets allow, which it may not; say allow=... on the command line")
        names: list[Any] = []
        for word in typed:
            value = OverridesParser.create().parse_override(word).value()
            names += value if isinstance(value, list) else [] if value is None else [value]
        return {str(name): allow(str(name)) for name in names}

    def _parse_overrides_and_create_caching_repo(
        self, config_name: str | None, overrides: list[str]
    ) -> tuple[list[Any], CachingConfigRepository]:
        parsed = OverridesParser.create().parse_overrides(overrides=overrides)
        self.files = FilesOfOne(self.repository)
        self._process_config_searchpath(config_name, parsed, self.files)
        return parsed, self.files

    def _is_chosen(self, config: DictConfig, group: str) -> bool:
        """Whether the command line, or a root of our own, chose a group's option."""
        typed = (re.split(r"[@=]", word.lstrip("+"))[0] for word in config.hydra.overrides.task)
        if any(key in (group, f"{group}._target_") for key in typed):
            return True
        name, chosen = config.hydra.job.config_name, config.hydra.runtime.choices.get(group)
        root, option = self.files.load_config(name), self.files.load_config(f"{group}/{chosen}")
        if root is None or option is None or not isinstance(option.config, DictConfig) or is_shared(root, name):
            return False
        defaults = [entry for entry in root.defaults_list or [] if isinstance(entry, GroupDefault)]
        return "_target_" in option.config and any((entry.group, entry.value) == (group, chosen) for entry in defaults)

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list[Any], repo: Any) -> None:
        primary = repo.load_config(config_path=config_name) if config_name is not None else None
        for override in parsed_overrides:
            if override.get_key_element() == "hydra.searchpath":
                for path in override.value() or []:
                    if "://" in str(path) and not str(path).startswith("file://"):
                        raise UserError(f"hydra.searchpath={path} is not a folder; a package would be imported")
        if primary is not None and OmegaConf.is_dict(primary.config):
            hydra = _content(primary).get("hydra")
            if isinstance(hydra, dict) and hydra.get("searchpath"):
                raise UserError(f"{config_name}: hydra.searchpath is not a config file's to set; use --config-dir")
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        loaded = repo.load_config(config_path=default.config_path)
        folder = Path(loaded.path.removeprefix("file://"))
        if loaded.path.startswith("file://") and not folder.samefile(config_folder()):
            self.given[default.config_path] = folder
        if is_shared(loaded, default.config_path):
            placed = self._embed_result_config(loaded, default.package)
            check_shared(_content(placed), f"{default.config_path.removesuffix('.yaml')}.yaml")
        result: ConfigResult = super()._load_single_config(default, repo)
        return result

    def get_group_options(
        self,
        group_name: str,
        results_filter: ObjectType | None = ObjectType.CONFIG,
        config_name: str | None = None,
        overrides: list[str] | None = None,
    ) -> list[str]:
        """The options of a group, out of this loader's sources; Hydra copies them whole for each group of `--help`."""
        if config_name or overrides:
            options: list[str] = super().get_group_options(group_name, results_filter, config_name, overrides)
        else:
            options = self.repository.get_group_options(group_name, results_filter)
        return options


def _content(result: ConfigResult) -> dict[str, Any]:
    """A file's settings as plain values, nothing in them resolved."""
    content = OmegaConf.to_container(result.config, resolve=False)
    return cast("dict[str, Any]", content)


def _composed(compose: Callable[[], Composed]) -> Composed:
    """What is composed; a refusal is one line."""
    try:
        return compose()
    except (HydraException, OmegaConfBaseException) as error:
        if _is_full_error():
            raise
        _refuse(hydras_words(error))
    except UserError as error:
        if COMPOSING.get():  # a student of a job, whose failures are recorded, so that a sweep goes on
            raise
        _refuse(str(error))
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RecursionError, OSError) as error:
        if COMPOSING.get() or _is_full_error():
            raise
        first = (str(error).splitlines() or [""])[0]
        _refuse(f"the config cannot be put together ({type(error).__name__}: {first}); see its defaults list and keys")


def _is_full_error() -> bool:
    """Whether a developer asked for Hydra's traceback."""
    return os.environ.get("HYDRA_FULL_ERROR", "0") != "0"


def _refuse(message: str) -> NoReturn:
    print(f"error: {printable(' '.join(message.split()))[:LONGEST_LINE]}", file=sys.stderr)
    raise SystemExit(2) from None
