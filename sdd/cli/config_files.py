"""Where configs lie, and how their files are read: within bounds, within their search path, and parsed once.

Every composition (a command's own, and one for every job of a sweep) is made of the same thirty files. What a file came
to is kept with its text, so that a file that changes is parsed anew; every composition gets a copy of its own, since
composing takes it apart.
"""

import copy
import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any, cast

import yaml
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import sdd
from sdd.config.shared import LARGEST, check_defaults, check_yaml
from sdd.errors import UserError
from sdd.untrusted import read_text

PACKAGE = Path(sdd.__file__).resolve().parent

SHARED = "experiment"
"""The group whose options are made to be passed on; they are nobody's own, wherever they lie."""
MOST_FILES = 1_000
"""Files of a config, counted once for each place that names them; ours is made of some hundred."""
HEADER = 512
"""Characters of a file in which Hydra looks for its package."""


def config_folder() -> Path:
    """The one root of config groups: in the checkout, or installed beside the package."""
    beside, inside = PACKAGE.parent / "conf", PACKAGE / "conf"
    return beside if (beside / "config.yaml").is_file() else inside


class BoundedFileSource(FileConfigSource):
    """The YAML files of one folder: none outside it, none larger or deeper than a config can be."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        self.root = os.path.realpath(self.path)

    def _place(self, config_path: str) -> Path:
        place = os.path.realpath(os.path.join(self.root, config_path))  # noqa: PTH118
        if Path(config_path).is_absolute() or not Path(place).is_relative_to(self.root):
            raise UserError(f"{config_path} leads out of the config folder {self.path}; refused")
        return Path(place)

    def text(self, config_path: str) -> str:
        name = self._normalize_file_name(config_path)
        return read_text(self._place(name), name, LARGEST)

    def load_config(self, config_path: str) -> ConfigResult:
        return self.parsed(config_path, self.text(config_path))

    def parsed(self, config_path: str, text: str) -> ConfigResult:
        """What a file of this text comes to."""
        name = self._normalize_file_name(config_path)
        check_yaml(text, name)
        try:
            config = OmegaConf.load(io.StringIO(text))
        except yaml.MarkedYAMLError as error:
            line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
            raise UserError(f"{name}{line}: not valid YAML ({error.problem})") from None
        except RecursionError:
            raise UserError(f"{name}: YAML that is nested too deeply") from None
        except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
            raise UserError(f"{name}: {(str(error).splitlines() or ['not valid YAML'])[0]}") from None
        header = self._get_header_dict(text[:HEADER])
        result = ConfigResult(provider=self.provider, path=f"file://{self.path}", config=config, header=header)
        if self.is_shared(config_path):
            if not isinstance(config, DictConfig):
                raise UserError(f"{name}: a config file holds settings by name (key: value)")
            check_defaults(content(result).get("defaults", []), name)
        return result

    def is_shared(self, config_path: str) -> bool:
        return self.root != os.path.realpath(config_folder()) or Path(config_path).parts[0] == SHARED

    def is_group(self, config_path: str) -> bool:
        return self._place(config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        return self._place(self._normalize_file_name(config_path)).exists()


def is_shared(result: ConfigResult, config_path: str) -> bool:
    return result.path.startswith("file://") and BoundedFileSource("", result.path).is_shared(config_path)


def content(result: ConfigResult) -> dict[str, Any]:
    """A file's settings as plain values, nothing in them resolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(result.config, resolve=False))


Origin = tuple[str, str, str, str]
"""The source of a config, its folder free of links, its name, and the digest of its text; packages and classes stay as
they are."""

MOST_PARSED = 2_000
"""Configs that are kept, a few KB each."""


class Parsed(ConfigResult):
    """A config as Hydra has taken it in, whose nodes are made when they are asked for, for one composition."""

    def __init__(self, result: ConfigResult, config: bytes) -> None:
        self.__dict__.update(vars(result))
        self.pickled = config
        del self.config

    def __getattr__(self, name: str) -> Any:
        if name != "config":
            raise AttributeError(name)
        self.config = pickle.loads(self.pickled)  # nothing copies nodes as fast
        return self.config


_parsed: dict[Origin, tuple[ConfigResult, bytes]] = {}
"""Of this process."""


class CheckedRepository(ConfigRepository):
    """Hydra's sources, folders and packages, with bounds around the folders. A process parses what they hold once."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        self.parsed = _parsed  # a worker's loader brings its own
        self.origins: dict[str, Origin] = {}
        """What was read last under each name."""
        super().__init__(config_search_path)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CheckedRepository":
        """For one composition, which may change the list of sources; it shares what was parsed and found."""
        other = copy.copy(self)
        other.sources, other.origins = list(self.sources), {}
        return other

    def initialize_sources(self, config_search_path: ConfigSearchPath) -> None:
        super().initialize_sources(config_search_path)
        for index, source in enumerate(self.sources):
            if source.scheme() == "file":  # Hydra loads its sources' module a second time, as another class
                self.sources[index] = BoundedFileSource(source.provider, source.path)
        self.found: dict[str, Any] = {}

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self.found.get(config_path) or self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None:
            return None
        self.found[config_path] = source
        is_folder = isinstance(source, BoundedFileSource)
        text, root = (source.text(config_path).encode(), source.root) if is_folder else (b"", "")
        origin = source.full_path(), root, config_path, hashlib.sha256(text).hexdigest()
        self.origins[config_path] = origin
        if origin not in self.parsed:
            result = super().load_config(config_path)
            assert result is not None, f"{config_path} in {source}"
            if len(self.parsed) >= MOST_PARSED:
                self.parsed.clear()
            self.parsed[origin] = result, pickle.dumps(result.config, pickle.HIGHEST_PROTOCOL)
            result.config = OmegaConf.create()
        return Parsed(*self.parsed[origin])


class FilesOfOne(CachingConfigRepository):
    """The files of one composition: no more than a config is made of."""

    def __init__(self, delegate: ConfigRepository) -> None:
        super().__init__(delegate)
        self.number = 0

    def load_config(self, config_path: str) -> ConfigResult | None:
        self.number += 1
        if self.number > MOST_FILES:
            raise UserError(f"{config_path}: the defaults lists name more than {MOST_FILES:,} files; refused")
        result: ConfigResult | None = super().load_config(config_path)
        return result
