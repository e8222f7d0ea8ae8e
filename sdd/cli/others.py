"""What a job of a sweep does while another process builds what it waits for: it builds for the sweep's other jobs.

Whichever launcher runs the jobs, and in how many processes, shells or nodes that share a folder: a job that would wait
looks for an artifact of another one that nobody builds, and comes back. A job whose turn comes later finds it there.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from sdd.cli.job import Job, typed
from sdd.cli.loader import CheckedConfigLoader
from sdd.cli.students import COMPOSING
from sdd.models.panics import is_panic
from sdd.store import Recipe
from sdd.untrusted import printable

log = logging.getLogger(__name__)

Words = tuple[str, ...]


class OtherJobs:
    """The jobs of this process's sweep but the one that runs now, those behind it first. Make it within a job."""

    def __init__(self, script: str, run_folder: Path) -> None:
        self.script, self.run_folder = script, run_folder
        self.sweep = CheckedConfigLoader.sweeping
        words = list(self.sweep.jobs) if self.sweep else []
        at = words.index(self.sweep.current) if self.sweep and self.sweep.current in words else len(words)
        self.waiting = [*words[at + 1 :], *words[:at]]
        self.planned: dict[Words, tuple[DictConfig, Job, Recipe | None]] = {}

    def advance(self) -> bool:
        """Build one artifact that a job lacks and nobody builds; whether there was one.

        A job that fails is left to its own turn, which tells why.
        """
        for words in list(self.waiting):
            try:
                with self._as_job(words) as (job, wanted):
                    if wanted is None or job.store(self.script).has(wanted):
                        self.waiting.remove(words)
                    elif job.advance(wanted, self.script):
                        return True
            except BaseException as error:
                if not isinstance(error, Exception) and not is_panic(error):
                    raise
                log.warning("%s: left to its own turn (%s)", " ".join(words), printable(str(error)))
                self.waiting.remove(words)
        return False

    @contextmanager
    def _as_job(self, words: Words) -> Iterator[tuple[Job, Recipe | None]]:
        """Another job, and what it is asked for; meanwhile Hydra's config is its own."""
        hydra_config = HydraConfig.instance()
        before = hydra_config.cfg
        config = self.planned[words][0] if words in self.planned else self._composed(words)
        try:
            hydra_config.set_config(config)
            if words not in self.planned:
                task = copy.deepcopy(config)
                with read_write(task), open_dict(task):
                    del task["hydra"]
                job = Job(task, typed(), self.run_folder)
                self.planned[words] = config, job, job.wanted(self.script)
            yield self.planned[words][1:]
        finally:
            hydra_config.cfg = before

    def _composed(self, words: Words) -> DictConfig:
        assert self.sweep is not None, "a job that is another one's is of a sweep"
        within = COMPOSING.set(True)
        try:
            config = self.sweep.config_of(words)
        finally:
            COMPOSING.reset(within)
        with read_write(config), open_dict(config):
            config.hydra.runtime.output_dir = str(self.run_folder)
        return config
