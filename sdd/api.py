"""The scripts from Python: a config composed and checked as on the command line, and what it asks for, built.

    job = compose("metric=angular", "pruning=n2", "finetune=none")
    folder = job.build(job.wanted("evaluate"))

`job.wanted` takes the name of a script, and `wanted.inputs` are what that is made of. The artifacts are those of the
command line, in the same place: nothing is computed twice.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
import hydra._internal.hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sdd.cli.config_files import config_folder
from sdd.cli.job import Job, typed
from sdd.cli.loader import CheckedConfigLoader
from sdd.cli.students import COMPOSING
from sdd.cli.words import arranged
from sdd.errors import UserError


def compose(*overrides: str, config_dir: Path | str | None = None) -> Job:
    """A job of these words, which are trusted as those of a command line are; files of `config_dir` are not.

    Raises `UserError` for what the scripts would refuse. Logs, trackers and runs of it go below `outputs/python/`.
    """
    folders = [] if config_dir is None else [Path(config_dir)]
    with composing(overrides, folders) as (config, _):
        run_folder = Path(config.hydra.run.dir)
        with open_dict(config):
            del config["hydra"]
        OmegaConf.resolve(config)
        return Job(config, typed(), run_folder)


@contextmanager
def composing(
    overrides: Iterable[str], folders: Iterable[Path] = ()
) -> Iterator[tuple[DictConfig, CheckedConfigLoader]]:
    """The config of these words, its `hydra` node included, and its loader; Hydra is there within."""
    hydra._internal.hydra.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]
    places = [QuotedString(f"file://{folder.resolve()}", Quote.single).with_quotes() for folder in folders]
    words = [*([f"hydra.searchpath=[{','.join(places)}]"] if places else []), *arranged(list(overrides))]
    within, before = COMPOSING.set(True), HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_folder()), job_name="python", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            assert isinstance(loader, CheckedConfigLoader)
            config = hydra.compose("config", words, return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            yield config, loader
    except UserError as error:
        raise UserError(" ".join(str(error).split())) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError((str(error).splitlines() or [type(error).__name__])[0]) from None
    finally:
        COMPOSING.reset(within)
        HydraConfig.instance().cfg = before
        GlobalHydra.instance().clear()


__all__ = ["Job", "compose"]
