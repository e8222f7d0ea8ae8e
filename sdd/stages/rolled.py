"""What a student writes while it is tuned: by which engine, and what that takes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from sdd.errors import UserError
from sdd.finetuning.modes import MODES, rollout_limit
from sdd.forward import ranks
from sdd.forward.decoding import Ending
from sdd.planning import estimates
from sdd.planning.cost_model import CostModel
from sdd.planning.estimates import Estimate
from sdd.rewriting.continued import ServedStudent
from sdd.rewriting.engines import HFEngine
from sdd.stages import handover
from sdd.stages.handover import WAYS, Handover
from sdd.stages.runtime import Runtime
from sdd.stages.sizes import Sizes
from sdd.store import Recipe
from sdd.untrusted import printable


def writer(rollouts: Any) -> dict[str, str]:
    """What is in the key of who writes: nothing where that is this process, nor where a server is."""
    return {} if rollouts.backend == "hf" else {"backend": rollouts.backend}


def rollouts_of(
    settings: dict[str, Any] | None,
    seed: int,
    tokenizer: Any,
    model: Any,
    rows: Sequence[Any],
    validation: Sequence[Any],
    plan: Sequence[Sequence[int]],
    max_length: int,
    student: Handover | None,
    runtime: Runtime,
) -> Any:
    """The student's own answers to the rows of `plan`, by this process or a server; None where it writes none."""
    if settings is None:
        return None
    from sdd.finetuning.rollouts import Policy, Rollouts
    from sdd.models.chats import stop_ids

    stops = stop_ids(tokenizer, model.generation_config)
    if "backend" in settings:
        assert student is not None, "a server is handed a student"
        prompts = (row.ids[: row.prompt_length] for row in chain(rows, validation))
        asking = _asking(settings, seed, tokenizer, stops, model.config, runtime)
        sample = _by_server(settings, asking, prompts, student)
    else:
        sample = _here(settings, seed, tokenizer, runtime)
    short, full = settings["rollout_tokens"]
    policy = Policy(settings["student_share"], (short, full), settings["rollout_steps"], seed, len(plan))
    return Rollouts(policy, rows, plan, max_length, stops, sample)


def _here(settings: dict[str, Any], seed: int, tokenizer: Any, runtime: Runtime) -> Any:
    """The sampling of `Rollouts` by the model as it is in this process."""

    def sample(
        model: Any, prompts: Sequence[list[int]], names: Sequence[str], limit: int, ending: Ending
    ) -> Iterator[tuple[int, list[int]]]:
        engine = HFEngine(max_new_tokens=limit, temperature=settings["rollout_temperature"], seed=seed)
        engine.take(model, tokenizer, None, runtime.inference_batch_size)
        return engine.continued(prompts, names, ending)

    return sample


def _asking(
    settings: dict[str, Any], seed: int, tokenizer: Any, stops: list[int], config: Any, runtime: Runtime
) -> ServedStudent:
    server, context = runtime.servers.get("rollouts"), getattr(config, "max_position_embeddings", None)
    if settings["backend"] not in tuple(WAYS):
        raise UserError(
            f"the recipe's rollouts are by {printable(str(settings['backend'])[:40])}, which is not known here"
        )
    if server is None:
        raise UserError("a server wrote this student's rollouts; say where it is with --server URL")
    as_text = settings["backend"] == "transformers"
    said = config.vocab_size, context, as_text, settings["rollout_temperature"], seed, server
    return ServedStudent(tokenizer, stops, *said)


def _by_server(settings: dict[str, Any], asking: ServedStudent, prompts: Iterable[list[int]], student: Handover) -> Any:
    """The same by a server. Of several ranks the first asks, and all hear."""
    server, sampled = asking.place.server, settings["rollout_temperature"] > 0
    if asking.as_text:
        for prompt in prompts:
            asking.text_of(prompt)  # refused before the first step

    def asked(
        model: Any, prompts: Sequence[list[int]], names: Sequence[str], limit: int, ending: Ending
    ) -> Iterator[tuple[int, list[int]]]:
        with WAYS[settings["backend"]](student, asking.client, server, sorted(asking.stops), sampled) as name:
            yield from asking.continued(name, prompts, names, limit, ending)

    def sample(*request: Any) -> Iterator[tuple[int, list[int]]]:
        if not ranks.is_rank():
            return asked(*request)
        return iter(ranks.merged(dict(asked(*request)) if ranks.rank() == 0 else {}).items())

    return sample


def check(runtime: Runtime, recipe: Recipe, folder: Path) -> None:
    """Refuse a server that cannot write a student's rollouts, before any work; `folder` is one that it has to see."""
    if backend := ((recipe.spec.get("distillation") or {}).get("rollouts") or {}).get("backend"):
        handover.check(backend, runtime.servers.get("rollouts"), folder)


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
    """Tokens of an answer that the student writes, on average over the steps of an epoch's `rows`; 0 where it writes
    none."""
    return _limit(sizes, rows, sizes.written) if writes(sizes) else 0.0


def _limit(sizes: Sizes, rows: int, most: float = math.inf) -> float:
    """Tokens of a rollout at most, on average over the steps, where no more than `most` count."""
    finetune = sizes.config.finetune
    steps, window = finetune.epochs * math.ceil(rows / finetune.batch_size), finetune.rollout_steps
    return _mean_limit(steps, window, tuple(finetune.rollout_tokens), most)


@lru_cache(maxsize=64)
def _mean_limit(steps: int, window: int, tokens: tuple[int, int], most: float) -> float:
    """Steps of a window have the limit of its first."""
    return fmean(min(most, rollout_limit(step // window * window, steps, tokens)) for step in range(steps))


def with_writing(sizes: Sizes, tuning: Estimate, student: CostModel, rows: int, validations: int) -> Estimate:
    """Tuning on `rows` an epoch, and what the student writes before: window by window, and of the held-out rows."""
    share, finetune = writes(sizes), sizes.config.finetune
    if not share:
        return tuning
    batch = sizes.setting("trainer.inference_batch_size")
    window = math.ceil(share * finetune.rollout_steps * finetune.batch_size)
    limit, full = _limit(sizes, rows), finetune.rollout_tokens[1]
    written = math.ceil(share * finetune.epochs * rows)
    parts = [estimates.rewrites(student, written, sizes.prompt, new(sizes, rows), limit, batch, window)]
    if held_out := finetune.validation_rows:
        held_out_new = min(sizes.written, full)
        settings = sizes.prompt, held_out_new, full, batch, held_out
        parts.append(estimates.rewrites(student, validations * held_out, *settings))
    seconds = sum(part.seconds - student.opening for part in parts)
    memory = max(tuning.memory, *(part.memory for part in parts))
    return Estimate(tuning.seconds + seconds, memory, tuning.disk)
