"""The tasks that the student, or the unpruned model, is evaluated on."""

import dataclasses
import importlib.metadata
from functools import cached_property
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.recipes.students import Students
from sdd.store import Recipe, digest_of


class Evaluations(Students):
    """Any model -> evaluated."""

    def evaluated(self) -> Recipe:
        settings = self.config.evaluation
        spec = {
            "suite": settings.suite,
            **(self._embedded_tasks() if settings.suite == "tiny" else self._stock_tasks()),
            "limit": settings.limit,
            "chat_template": settings.chat_template,
            "system_prompt": settings.system_prompt,
            "dtype": self._dtype("evaluation"),
            "max_new_tokens": settings.max_new_tokens,
            "lm_eval": importlib.metadata.version("lm-eval"),
            **(self._plain_template(self.model_digest) if settings.chat_template else {}),
        }
        student = self.student()
        if student is None:
            return self._recipe("evaluated", spec | {"model": self.model_digest}, {}, {})
        return self._recipe("evaluated", spec, {"model": student}, student.labels)

    def _embedded_tasks(self) -> dict[str, Any]:
        from sdd.evaluation.tiny import suite_tasks

        settings = self.config.evaluation
        for key in ("data_dir", "num_fewshot"):
            if settings[key] is not None:
                raise UserError(f"evaluation.{key} belongs to lm-eval's tasks; leave it out with evaluation=tiny")
        if settings.max_new_tokens is None:
            raise UserError("evaluation.max_new_tokens=null, but the embedded tasks set no limit; give a number")
        names = None if settings.tasks is None else list(settings.tasks)
        tasks = suite_tasks(settings.suite, names, settings.split, settings.seed, settings.limit)
        digests = {name: digest_of(dataclasses.asdict(task)) for name, task in tasks.items()}
        return {"tasks": digests, "split": settings.split, "seed": settings.seed}

    @cached_property
    def _benchmark(self) -> Any:
        from sdd.evaluation.benchmark import Benchmark

        settings = self.config.evaluation
        names = None if settings.tasks is None else list(settings.tasks)
        return Benchmark(settings.suite, names, settings.num_fewshot)

    @cached_property
    def _stock_rows(self) -> tuple[dict[str, dict[str, str]], dict[str, Path]]:
        """What the recipe says of the rows of lm-eval's tasks, and the local files by digest."""
        found: tuple[dict[str, dict[str, str]], dict[str, Path]]
        found = self._benchmark.data(self.config.evaluation.data_dir, self.digest_memory)
        return found

    def _check_stock_rows(self) -> None:
        """Read every row that lm-eval's tasks ask for, from the hub where no files are given."""
        data, files = self._stock_rows
        self._benchmark.check({name: files[digest] for name, digest in data["files"].items()} if files else None)

    def _stock_tasks(self) -> dict[str, Any]:
        from sdd.evaluation.suites import SUITES

        settings = self.config.evaluation
        if settings.suite not in SUITES:
            raise UserError(f"evaluation.suite={settings.suite} is unknown; choose one of tiny, {', '.join(SUITES)}")
        if settings.split is not None:
            what = f"evaluation.split={settings.split}"
            raise UserError(f"{what}, but lm-eval's tasks name their own split; set evaluation.split=null")
        data, files = self._stock_rows
        self.sources |= files
        shown = {"asked": self._benchmark.names, "num_fewshot": settings.num_fewshot}
        return {"tasks": self._benchmark.digests(), "data": data, **shown}
