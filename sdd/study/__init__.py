"""What one composed config names - models, rows, texts, students - as digests and as places of this machine.

Recipes are made of it, in `sdd/stages/`. Reads only configs, digests and row counts; computes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sdd.config import check_pruning, plain
from sdd.finetuning.losses import weights_of
from sdd.finetuning.modes import MODES
from sdd.store import STAGES, Recipe, canonical
from sdd.study.calibration import Calibration
from sdd.study.keeping import with_size
from sdd.study.models import STAND_IN, Models
from sdd.study.rows import Rows

log = logging.getLogger(__name__)

MOST_HELD_OUT = 5
"""One row in so many may be held out."""

__all__ = ["Study", "is_provisional"]


def is_provisional(recipe: Recipe) -> bool:
    """Whether the recipe's address is another one once all it names has been fetched."""
    return any(STAND_IN in canonical(upstream.spec) for upstream in recipe.walk())


class Study:
    """One config; `students` are the studies of students to merge, `before` that of the student that is cut further.

    `sources` maps the digests that recipes name to paths on this machine, `texts` to calibration texts; `tasks` are
    lm-eval's, by name, where they have been built.
    """

    def __init__(
        self, config: DictConfig, digest_memory: Path, students: Sequence[Study] = (), before: Study | None = None
    ) -> None:
        assert (before is None) == (config.pruning.after is None), "what is cut further has a study of its own"
        self.digest_memory, self.students, self.before = digest_memory, list(students), before
        self.sources: dict[str, Path] = before.sources if before else {}
        self.texts: dict[str, list[str]] = before.texts if before else {}
        self.tasks: dict[str, Any] = {}
        self.models = Models(config, digest_memory, self.sources)
        removed = 0 if before is None else self.models.num_blocks - before.blocks_left
        self.config = config = with_size(config, self.models, removed)
        self.rows = Rows(config.dataset, self.sources)
        self.prompts = self.rows if config.analysis.prompts is None else Rows(config.analysis.prompts, self.sources)
        self.calibration = Calibration(config, self.rows)
        check_pruning(config.pruning, self.num_blocks)

    @property
    def others(self) -> list[Study]:
        """The studies of the students that this one's are made of."""
        direct = [*self.students, *([self.before] if self.before else [])]
        return [study for one in direct for study in (*one.others, one)]

    @property
    def num_blocks(self) -> int:
        """Blocks of what is cut: of the unpruned model, or of the student that is cut further."""
        return self.models.num_blocks if self.before is None else self.before.blocks_left

    @property
    def blocks_removed(self) -> int:
        """By this cut."""
        pruning = self.config.pruning
        return int(pruning.size if pruning.blocks is None else len(pruning.blocks))

    @property
    def blocks_left(self) -> int:
        return self.num_blocks - self.blocks_removed

    @cached_property
    def losses(self) -> dict[str, float]:
        """The weight of each loss that the student is trained on; none where it is not trained."""
        finetune = plain(self.config.finetune)
        if finetune["mode"] not in MODES:
            return {}
        return weights_of(MODES[finetune["mode"]].loss, finetune["ce_share"], finetune["loss"])

    @cached_property
    def validation_rows(self) -> int:
        """Rows that no student is trained on: as many as are asked for, at most a fifth of those that there are."""
        asked, rows = int(self.config.finetune.validation_rows), self.rows.source.known_rows()
        if rows is None or asked <= rows // MOST_HELD_OUT:
            return asked
        held_out = rows // MOST_HELD_OUT
        log.warning(
            "finetune.validation_rows=%d is over a fifth of the %d rows; %d are held out", asked, rows, held_out
        )
        return int(held_out)

    def recipe(
        self, stage: str, spec: Any, inputs: dict[str, Recipe], labels: dict[str, str], raised: int = 0
    ) -> Recipe:
        """A recipe of a stage's typed spec; `raised` is what its version is raised by in this case."""
        return Recipe(stage, STAGES[stage].version + raised, spec.key(), inputs, dict(labels))

    def raised_for(self, student: Recipe | None, dtype: str) -> int:
        """What the version of a stage in which the model, or a student of it, writes is raised by.

        By 1 where the checkpoint ships settings that steer generation, which were once obeyed; by 4 where a student
        with an adapter runs in 16 bits, whose rotary frequencies were once rounded too.
        """
        adapted = student is not None and student.stage == "tuned" and student.spec["adapter"].get("method") != "full"
        return self.models.steers(self.models.digest) + 4 * (adapted and dtype != "float32")
