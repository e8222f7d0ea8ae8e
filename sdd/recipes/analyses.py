"""What is measured of a student besides its scores: speculative decoding, distribution shift, cost."""

import importlib.util
import logging
from functools import cached_property
from typing import Any

from sdd.analysis.shift import embedder_digest, embedder_folder
from sdd.errors import UserError
from sdd.recipes.evaluations import Evaluations
from sdd.recipes.models import STAND_IN
from sdd.store import Recipe

log = logging.getLogger(__name__)


class Analyses(Evaluations):
    """Teacher and student -> answered -> drafted, shifted; targets -> surprisals -> shifted; both -> measured."""

    @cached_property
    def _prompts(self) -> Any:
        """The source of the prompts: the dataset itself, or another one."""
        other = self.config.analysis.prompts
        return self._dataset if other is None else self._source(other)

    @cached_property
    def _prompts_spec(self) -> dict[str, Any]:
        if self.config.analysis.prompts is None:
            return self._dataset_spec
        self.sources |= self._prompts.sources()
        return {"_target_": self.config.analysis.prompts._target_, **self._prompts.spec()}

    @property
    def _held_out(self) -> int:
        """How many prompts: those that no student is trained on, or as many as are asked for."""
        asked = self.config.analysis.num_prompts
        return int(self.config.finetune.validation_rows if asked is None else asked)

    def _check_held_out(self, num_examples: int) -> None:
        """Refuse prompts that are not there, or not held out."""
        held_out, validation = self._held_out, self.config.finetune.validation_rows
        if held_out < 1:
            raise UserError("finetune.validation_rows=0 holds no prompt out; raise it, or set analysis.prompts")
        if held_out > num_examples:
            raise UserError(f"analysis.num_prompts={held_out}, but the dataset has {num_examples} rows; ask for fewer")
        if self.config.analysis.prompts is None and held_out > validation:
            raise UserError(
                f"analysis.num_prompts={held_out}, but finetune.validation_rows={validation} are held out; "
                "ask for fewer, or hold out more"
            )

    def answered(self, student: Recipe | None) -> Recipe:
        """The greedy answers of a student, or of the unpruned model (None), to the held-out prompts."""
        if (rows := self._prompts.known_rows()) is not None:
            self._check_held_out(rows)
        spec = {
            "dataset": self._prompts_spec,
            "held_out": self._held_out,
            "system_prompt": self.config.dataset.system_prompt,
            "dtype": self._dtype("analysis"),
            "max_new_tokens": self.config.analysis.max_new_tokens,
            "max_prompt_tokens": self.config.engine.get("max_prompt_tokens", 1024),
            **self._plain_template(self.model_digest),
        }
        labels = {"dataset": (self.config.analysis.prompts or self.config.dataset).name}
        if student is None:
            return self._recipe("answered", spec | {"model": self.model_digest}, {}, labels)
        return self._recipe("answered", spec, {"model": student}, labels)

    def surprisals(self) -> Recipe:
        """What the unpruned model makes of the targets, whoever wrote them."""
        spec = {
            "model": self.model_digest,
            "dtype": self._dtype("analysis"),
            "system_prompt": self.config.dataset.system_prompt,
            "max_length": self.config.finetune.max_length,
            **self._plain_template(self.model_digest),
        }
        return self._recipe("surprisals", spec, {"targets": self.targets()}, self._labels)

    def analysed(self) -> Recipe:
        """The artifact of the analysis that the config asks for."""
        settings, student = self.config.analysis, self.student()
        if student is None:
            raise UserError(
                f"analysis={settings.kind} compares a student with the unpruned model; add for example pruning=n2"
            )
        spec: dict[str, Any] = {"dtype": self._dtype("analysis")}
        if settings.kind == "cost":
            spec["model"] = self.model_digest
            spec |= {key: settings[key] for key in ("context", "prompt_tokens", "new_tokens", "batch_size", "repeats")}
            return self._recipe("measured", spec, {"model": student}, student.labels)
        inputs = {"model": student, "answers": self.answered(None)}
        labels = student.labels | {"prompts": inputs["answers"].labels["dataset"]}
        if settings.kind == "speculative":
            spec |= {"draft_lengths": sorted(set(settings.draft_lengths)), "temperature": settings.temperature}
            spec["repeats"] = settings.repeats
            if settings.repeats:
                spec |= {"timed_lengths": list(settings.timed_lengths), "timed_prompts": settings.timed_prompts}
            return self._recipe("drafted", spec, inputs, labels)
        inputs["responses"] = self.answered(student)
        if student.stage == "tuned":
            inputs["surprisals"] = self.surprisals()
        return self._recipe("shifted", spec | self._embedder(), inputs, labels)

    def _embedder(self) -> dict[str, str]:
        """The embedder's digest for the key; nothing where there is none, or nothing to open it with."""
        path, revision = self.config.analysis.embedder, self.config.analysis.embedder_revision
        if path is None:
            return {}
        if importlib.util.find_spec("sentence_transformers") is None:
            log.info("no embedding similarity: it needs sentence-transformers; run: pip install 'sdd[shift]'")
            return {}
        folder = embedder_folder(path, revision, fetch=not self.config.dry_run)
        if folder is None:
            return {"embedder": f"{STAND_IN}{path}@{revision}"}
        digest = embedder_digest(folder, self.digest_memory)
        self.sources[digest] = folder
        return {"embedder": digest}
