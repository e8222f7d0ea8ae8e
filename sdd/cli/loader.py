"""Hydra's config loader, which knows who said what: files are checked one by one, before they are put together.

Trusted are the command line, the code's own defaults (the schema, Hydra's, its plugins'), and this project's groups. An
experiment, and every file of a folder that somebody names, may say only what `shared_configs` allows. Files are read
within bounds and within their search path, and the composed config passes the allow-list before Hydra instantiates
anything, in every job of a sweep too. Hydra 1.4 takes the same list as `execution_whitelist`.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import GroupDefault, ResultDefault
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdd.cli.config_files import PACKAGE, CheckedRepository, FilesOfOne, config_folder, content, is_shared
from sdd.cli.mistakes import Composition, hydras_words
from sdd.cli.parts import PARTS, choices_where_asked_for
from sdd.cli.students import COMPOSING
from sdd.cli.words import as_override, chosen
from sdd.config import Config
from sdd.config.allowed import check_targets, name_own
from sdd.config.nodes import copied
from sdd.config.own import allow
from sdd.config.shared import SERVERS, check_jobs, check_shared
from sdd.errors import UserError
from sdd.untrusted import printable

ConfigStore.instance().store(name="schema", node=Config)
OmegaConf.register_new_resolver("package_folder", lambda sub: str(PACKAGE / sub), replace=True)
OmegaConf.register_new_resolver("process_id", lambda: str(os.getpid()), replace=True, use_cache=True)  # for workers too

SUBMITIT = "hydra_plugins.hydra_submitit_launcher"
LONGEST_LINE = 2_000
"""Characters of a refusal: more than any of ours."""
MOST_VALIDATED = 500
"""Jobs of a sweep whose configs are kept until they begin, some 200 KB each; those of the others are composed again."""
MOST_FOLDERS = 50
"""Folders of a group that are looked into for the names of its options, where a mistake is explained."""

Composed = TypeVar("Composed")


def own_loader() -> "CheckedConfigLoader":
    """A loader of this project's own configs."""
    version.setbase("1.3")
    return CheckedConfigLoader(create_config_search_path(str(config_folder())))


class CheckedConfigLoader(ConfigLoaderImpl):
    """Hydra's loader; every composition passes here."""

    sweeping: ClassVar["CheckedConfigLoader | None"] = None
    """The one that composed a job last."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self.repository = _composed(lambda: CheckedRepository(config_search_path=config_search_path))
        self.files = FilesOfOne(self.repository)
        self.given: dict[str, Path] = {}
        """The files of folders that somebody named, which a composition has read, and the folder of each."""
        self.parts = PARTS
        self.validated: dict[tuple[str, ...], DictConfig] | None = {}
        """Configs of a sweep's jobs that have been composed to see whether they can be, until they are asked for."""

        self.jobs: dict[tuple[str, ...], None] = {}
        """A sweep's jobs, as far as they have been composed, by the words that they have of their own."""
        self.current: tuple[str, ...] = ()
        self.master: DictConfig | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Launchers pickle the loader for each job: with what was parsed, without what was composed."""
        return self.__dict__ | {"files": FilesOfOne(self.repository), "validated": None, "master": None}

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
            _check_servers(config)
            if OmegaConf.select(config, "logger._target_") and not self._is_chosen(config, "logger"):
                raise UserError("a config file chooses logger, which it may not; say logger=... on the command line")
            if run_mode == RunMode.MULTIRUN:
                _check_launcher(config.hydra.launcher)
            sweeper = config.hydra.sweeper
            if sweeper.get("params"):
                check_jobs(sweeper.params, all_combined=sweeper._target_.endswith(".BasicSweeper"))
            return config

        return _composed(load)

    def _loaded(self, config_name: str | None, overrides: list[str], run_mode: RunMode, **kwargs: Any) -> DictConfig:
        with choices_where_asked_for():
            config: DictConfig = super().load_configuration(config_name, overrides, run_mode, **kwargs)
        return config

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of a job; Hydra asks twice, before the first job begins and before this one does."""
        words = self.current = tuple(sweep_overrides)
        self.jobs[words], self.master = None, master_config
        CheckedConfigLoader.sweeping = self
        if self.validated and words in self.validated:
            config: DictConfig = self.validated.pop(words)
            OmegaConf.copy_cache(from_config=master_config, to_config=config)
            return config
        config = super().load_sweep_config(master_config, sweep_overrides)
        if self.validated is not None and len(self.validated) < MOST_VALIDATED:
            self.validated[words] = copied(config)
        return config

    def config_of(self, words: tuple[str, ...]) -> DictConfig:
        """The config of a job of the sweep whose turn it is not; what has been composed stays for its turn."""
        assert self.master is not None, "a job has been composed"
        if self.validated and words in self.validated:
            config: DictConfig = copied(self.validated[words])
            OmegaConf.copy_cache(from_config=self.master, to_config=config)
            return config
        composed: DictConfig = super().load_sweep_config(self.master, list(words))
        return composed

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
        parsed = [as_override(word) or OverridesParser.create().parse_overrides([word])[0] for word in overrides]
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
            hydra = content(primary).get("hydra")
            if isinstance(hydra, dict) and hydra.get("searchpath"):
                raise UserError(f"{config_name}: hydra.searchpath is not a config file's to set; use --config-dir")
        super()._process_config_searchpath(config_name, parsed_overrides, repo)

    def _compose_config_from_defaults_list(self, defaults: list[ResultDefault], repo: Any) -> DictConfig:
        origins, own = repo.delegate.origins, f"file://{config_folder()}"
        for one in defaults:
            place = origins[one.config_path][0]
            if place.startswith("file://") and place != own:
                folder = Path(place.removeprefix("file://"))
                if not folder.samefile(config_folder()):
                    self.given[one.config_path] = folder
        keys = [(one.package, (one.is_self, one.primary, origins[one.config_path])) for one in defaults]
        for one, key in zip(defaults, keys, strict=True):
            if key not in self.parts.said:
                self.parts.read(key, self._load_single_config(one, repo).config)
        return self.parts.composed(
            defaults, keys, lambda some: super(CheckedConfigLoader, self)._compose_config_from_defaults_list(some, repo)
        )

    def _load_single_config(self, default: Any, repo: Any) -> ConfigResult:
        loaded = repo.load_config(config_path=default.config_path)
        if is_shared(loaded, default.config_path):
            placed = self._embed_result_config(loaded, default.package)
            check_shared(content(placed), f"{default.config_path.removesuffix('.yaml')}.yaml")
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


def _check_launcher(launcher: DictConfig) -> None:
    """Refuse one whose package is not there: a preset composes without it."""
    if launcher._target_.startswith(SUBMITIT) and importlib.util.find_spec(SUBMITIT) is None:
        raise UserError("this launcher needs the package hydra-submitit-launcher; run: pip install 'sdd[cluster]'")


def _check_servers(config: DictConfig) -> None:
    """Refuse a server that no word of the command line names: rows and templates would be sent there."""
    for setting in SERVERS:
        node, name = setting.split(".")
        url = OmegaConf.to_container(config[node], resolve=False).get(name)  # type: ignore[union-attr]
        typed = any(word.lstrip("+").startswith(f"{setting}=") for word in config.hydra.overrides.task)
        if url is not None and (not typed or "${" in str(url)):
            raise UserError(
                f"a config file sets {setting}={url}, which it may not; say {setting}=... on the command line"
            )


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
