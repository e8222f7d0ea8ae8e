"""What a student writes while it is tuned: by which engine, and what that takes."""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from sdd.finetuning.modes import MODES, rollout_limit
from sdd.planning import estimates
from sdd.planning.cost_model import CostModel
from sdd.planning.estimates import Estimate
from sdd.rewriting.engines import HFEngine
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes


def rollouts_of(
    settings: dict[str, Any] | None,
    seed: int,
    tokenizer: Any,
    model: Any,
    rows: Sequence[Any],
    plan: Sequence[Sequence[int]],
    max_length: int,
    runtime: Runtime,
) -> Any:
    """The student's own answers to the rows of `plan`, in this process; None where it writes none."""
    if settings is None:
        return None
    from sdd.finetuning.rollouts import Policy, Rollouts
    from sdd.forward.decoding import Ending
    from sdd.models.chats import stop_ids

    def sample(
        model: Any, prompts: Sequence[list[int]], names: Sequence[str], limit: int, ending: Ending
    ) -> Iterator[tuple[int, list[int]]]:
        engine = HFEngine(max_new_tokens=limit, temperature=settings["rollout_temperature"], seed=seed)
        engine.take(model, tokenizer, None, runtime.inference_batch_size)
        return engine.continued(prompts, names, ending)

    short, full = settings["rollout_tokens"]
    policy = Policy(settings["student_share"], (short, full), settings["rollout_steps"], seed, len(plan))
    return Rollouts(policy, rows, plan, max_length, stop_ids(tokenizer, model.generation_config), sample)


def writes(sizes: Sizes) -> float:
    """The share of the rows that the student answers itself."""
    finetune = sizes.config.finetune
    mode = MODES.get(finetune.mode)
    return float(finetune.student_share) if mode is not None and mode.rollouts else 0.0


def target(sizes: Sizes) -> float:
    """Tokens of a given target on average; those of rewrites and of gold answers are in the teacher's words."""
    finetune = sizes.config.finetune
    kind = MODES[finetune.mode].targets if finetune.mode in MODES else "reference"
    share = {"reference": 1.0, "gold": 0.0, "rewrites": float(finetune.gold_share)}[kind]
    return share * sizes.answer + (1 - share) * sizes.written


def new(sizes: Sizes, rows: int) -> float:
    """Tokens of an answer that the student writes, on average over the steps of an epoch's `rows`."""
    return fmean(min(sizes.written, limit) for limit in _limits(sizes, rows))


def _limits(sizes: Sizes, rows: int) -> list[int]:
    """Tokens of a rollout at most, step by step; those of a window have that of its first."""
    finetune = sizes.config.finetune
    steps, window = finetune.epochs * math.ceil(rows / finetune.batch_size), finetune.rollout_steps
    return [rollout_limit(step // window * window, steps, finetune.rollout_tokens) for step in range(steps)]


def with_writing(sizes: Sizes, tuning: Estimate, student: CostModel, rows: int, validations: int) -> Estimate:
    """Tuning on `rows` an epoch, and what the student writes before: window by window, and of the held-out rows."""
    share, finetune, batch = writes(sizes), sizes.config.finetune, sizes.setting("trainer.inference_batch_size")
    if not share:
        return tuning
    window = math.ceil(share * finetune.rollout_steps * finetune.batch_size)
    limit, full = fmean(_limits(sizes, rows)), finetune.rollout_tokens[1]
    written = math.ceil(share * finetune.epochs * rows)
    parts = [estimates.rewrites(student, written, sizes.prompt, new(sizes, rows), limit, batch, window)]
    if held_out := sizes.config.finetune.validation_rows:
        held_out_new = min(sizes.written, full)
        settings = sizes.prompt, held_out_new, full, batch, held_out
        parts.append(estimates.rewrites(student, validations * held_out, *settings))
    seconds = sum(part.seconds - student.opening for part in parts)
    memory = max(tuning.memory, *(part.memory for part in parts))
    return Estimate(tuning.seconds + seconds, memory, tuning.disk)
