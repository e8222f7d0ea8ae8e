"""Rows and texts for the embedded model, from the `pool` split: neither the teacher's nor the evaluation's."""

import random
from functools import cache
from pathlib import Path
from typing import Any

from sdd.data import Example
from sdd.errors import UserError
from sdd.models.control import OwnText
from sdd.store import digest_of
from sdd.tiny.registers import REGISTERS, reference_of
from sdd.tiny.tasks import Instance, instances

DEFAULT_ROWS = 2_000
CALIBRATION_SEED = 1_000_003


@cache
def _drawn(seed: int, n: int, families: tuple[str, ...] | None, key: str) -> tuple[Instance, ...]:
    """`key` is the setting that asks for so many."""
    try:
        return tuple(instances("pool", seed, n, list(families) if families else None))
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


class TinyTasks:
    """`num_rows` tasks of the families (all by default), in turn; a prefix of a longer draw with the same seed.

    `register` and `reasoning` (0 to 1) say how the references are put: see `sdd.tiny.registers`.
    """

    has_gold = True

    def __init__(
        self,
        families: list[str] | None = None,
        num_rows: int | None = None,
        seed: int = 0,
        path: str | None = None,
        register: str = "medium",
        reasoning: float = 1.0,
    ) -> None:
        if register not in REGISTERS:
            raise UserError(f"dataset.register={register}: choose one of {', '.join(REGISTERS)}")
        if not 0 <= reasoning <= 1:
            raise UserError(f"dataset.reasoning={reasoning} is not between 0 and 1; 0.5 keeps half of the worked lines")
        if path is not None:
            raise UserError("dataset.path is not used by the embedded datasets; choose dataset=local")
        self.num_rows = num_rows or DEFAULT_ROWS
        self.families = tuple(families) if families else None
        self.seed = seed
        self.register, self.reasoning = register, reasoning

    def known_rows(self) -> int:
        return self.num_rows

    def sources(self) -> dict[str, Path]:
        return {}

    def examples(self) -> list[Example]:
        return [
            Example(
                task.id,
                task.prompt,
                reference_of(task, self.register, self.reasoning),
                task.answer,
                task.gold,
                task.family,
            )
            for task in _drawn(self.seed, self.num_rows, self.families, "dataset.num_rows")
        ]

    def spec(self) -> dict[str, Any]:
        """What recipes say of these rows; `digest` is of the rows themselves."""
        rows = [[e.id, e.prompt, e.reference, e.answer, e.gold] for e in self.examples()]
        return {
            "digest": digest_of(rows),
            "families": list(self.families) if self.families else None,
            "num_rows": self.num_rows,
            "seed": self.seed,
            **({"register": self.register} if self.register != "medium" else {}),
            **({"reasoning": self.reasoning} if self.reasoning != 1 else {}),
        }


class TinyTexts:
    """Conversations with the teacher's kind of answer, each cut at a random space inside the answer.

    At the last token of a whole conversation, or of a bare prompt, every text would be measured at the same token.
    """

    def __init__(self, num_texts: int, path: str | None = None) -> None:
        if path is not None:
            raise UserError("calibration.path is not used by calibration=tiny; choose calibration=local")
        self.num_texts = num_texts

    def texts(self) -> list[str]:
        rng = random.Random("calibration")
        texts: list[str] = []
        for task in _drawn(CALIBRATION_SEED, self.num_texts, None, "calibration.num_texts"):
            words = task.gold.split(" ")
            answer = " ".join(words[: rng.randint(1, len(words))])
            texts.append(OwnText(f"<|user|>{task.prompt}<|end|><|assistant|>{answer}"))
        return texts

    def spec(self) -> dict[str, Any]:
        """What recipes say of these texts."""
        return {"texts": digest_of(self.texts())}
