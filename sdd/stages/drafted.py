"""Stage `drafted`: the student drafts for the unpruned model, over that model's own answers to held-out prompts.

`drafted.json` and `prompts.jsonl` follow from the recipe on any machine (in float32). `timings.json` is what the
machine that built the artifact took; it names that machine, is no content of the recipe, and is taken once, when the
artifact is built: another folder of artifacts takes it anew. Prompts that the student was trained on are left out.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from sdd.analysis import costs, speculative
from sdd.analysis.speculative import Generated, Passes
from sdd.forward import ranks
from sdd.models.chats import stop_ids
from sdd.planning import estimates
from sdd.planning.estimates import Estimate
from sdd.stages import answered
from sdd.stages.answered import Answered, shown
from sdd.stages.runtime import Runtime
from sdd.stages.sharing import shared
from sdd.stages.sizes import Sizes
from sdd.stages.spec import Spec
from sdd.store import TIMINGS, Recipe
from sdd.store.files import write_json, write_jsonl
from sdd.study import Study

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drafted(Spec):
    """Timings are taken where `repeats` is above 0."""

    dtype: str
    draft_lengths: list[int]
    temperature: float
    repeats: int
    timed_lengths: list[int] | None = None
    timed_prompts: int | None = None


def recipe(study: Study, student: Recipe) -> Recipe:
    settings = study.config.analysis
    inputs = {"model": student, "answers": answered.recipe(study, None)}
    labels = student.labels | {"prompts": inputs["answers"].labels["dataset"]}
    spec = Drafted(
        dtype=study.models.dtype("analysis"),
        draft_lengths=sorted(set(settings.draft_lengths)),
        temperature=settings.temperature,
        repeats=settings.repeats,
        timed_lengths=list(settings.timed_lengths) if settings.repeats else None,
        timed_prompts=settings.timed_prompts if settings.repeats else None,
    )
    return study.recipe("drafted", spec, inputs, labels, study.raised_for(student, spec.dtype))


LESS = ("trainer.inference_batch_size",)
"""Settings that take memory from it, and leave its result."""


def estimate(sizes: Sizes, recipe: Recipe) -> Estimate:
    settings, dtype = sizes.config.analysis, Drafted.read(recipe.spec).dtype
    asked = Answered.read(recipe.inputs["answers"].spec)
    cost_model, batch = sizes.cost_model(sizes.shape.blocks, dtype), sizes.setting("trainer.inference_batch_size")
    needed = estimates.drafted(cost_model, asked.held_out, sizes.prompt + asked.max_new_tokens, batch)
    rounds = settings.repeats * settings.timed_prompts * 2 * (1 + len(settings.timed_lengths))
    seconds, _ = cost_model.generation(rounds, sizes.prompt, settings.max_new_tokens, 1) if rounds else (0.0, 0.0)
    return replace(needed, seconds=needed.seconds + seconds)


def build(runtime: Runtime, recipe: Recipe, inputs: Mapping[str, Path], folder: Path) -> None:
    """`drafted.json`, `prompts.jsonl` from which it can be recomputed, and `timings.json`."""
    if shared(build, runtime, recipe, inputs, folder):
        return
    spec, given, batch = Drafted.read(recipe.spec), shown(runtime, recipe, inputs), runtime.inference_batch_size
    matches = speculative.greedy_matches(given.student, given.rows, batch)
    sampled = speculative.sampling_acceptance(given.teacher, given.student, given.rows, batch, spec.temperature)
    if ranks.rank() > 0:
        return
    records = [
        record_of(answer, row, spec.draft_lengths) | {"sampling_acceptance": fmean(accepted)}
        for answer, row, accepted in zip(given.answers, matches, sampled, strict=True)
    ]
    write_jsonl(folder / "prompts.jsonl", records)
    result = summary(records)
    write_json(folder / "drafted.json", result)
    log.info("accepted: %.1f%% of the unpruned model's tokens", 100 * result["acceptance_rate"])
    if spec.repeats:
        stops = stop_ids(given.tokenizer, given.teacher.generation_config)
        prompts = [prompt for prompt, _ in given.rows[: spec.timed_prompts]]
        longest = Answered.read(recipe.inputs["answers"].spec).max_new_tokens
        timings = _timings(given.teacher, given.student, prompts, stops, spec, longest, runtime.device, result)
        write_json(folder / TIMINGS, timings)


def record_of(answer: dict[str, Any], matches: Sequence[bool], draft_lengths: Sequence[int]) -> dict[str, Any]:
    """One prompt: where the student says what the unpruned model says ("1"), and the passes at every draft length."""
    lengths = {}
    for length in draft_lengths:
        passes = asdict(speculative.simulate(matches, length, answer["finish"] == "stop"))
        lengths[str(length)] = {key: passes[key] for key in ("passes", "drafted", "accepted")}
    text = "".join("1" if match else "0" for match in matches)
    return {"id": answer["id"], "tokens": len(text), "matched": text.count("1"), "matches": text, "lengths": lengths}


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All prompts together, by draft length."""
    tokens = sum(record["tokens"] for record in records)
    lengths = {}
    for length in records[0]["lengths"]:
        passes = sum((Passes(record["tokens"], **record["lengths"][length]) for record in records), Passes())
        lengths[length] = {
            "mean_accepted_length": passes.mean_accepted_length,
            "block_efficiency": passes.block_efficiency,
            "accepted_share": passes.accepted_share,
            "passes": passes.passes,
        }
    return {
        "prompts": len(records),
        "tokens": tokens,
        "acceptance_rate": sum(record["matched"] for record in records) / tokens,
        "sampling_acceptance": sum(record["sampling_acceptance"] * record["tokens"] for record in records) / tokens,
        "lengths": lengths,
    }


def _timings(
    teacher: Any,
    student: Any,
    prompts: list[list[int]],
    stops: list[int],
    spec: Drafted,
    new_tokens: int,
    device: str,
    result: dict[str, Any],
) -> dict[str, Any]:
    """Assisted against plain generation by transformers, batch 1, in turns, and what the cost model says of it."""
    lengths, repeats, opened = spec.timed_lengths or [], spec.repeats, {"teacher": teacher, "student": student}
    ways: list[int | None] = [None, *lengths]
    runs: dict[tuple[str, int | None], list[list[Generated]]] = {}
    for repeat in range(repeats + 1):  # the first round, of one prompt, warms up
        for number, prompt in enumerate(prompts if repeat else prompts[:1]):
            for kind, way in product(("greedy", "sampling"), ways):
                draft = None if way is None else (student, way)
                sampled = (spec.temperature, number) if kind == "sampling" else None
                one = speculative.generate(teacher, prompt, stops, new_tokens, draft, sampled)
                if repeat:
                    runs.setdefault((kind, way), [[] for _ in range(repeats)])[repeat - 1].append(one)
    context = round(fmean(len(prompt) for prompt in prompts) + result["tokens"] / result["prompts"] / 2)
    shown = {"teacher": ("teacher", 1), "student": ("student", 1)}
    shown |= {f"verification {length}": ("teacher", length + 1) for length in lengths}
    seconds = costs.step_seconds(opened, shown, context, 10 * repeats, device)
    ratio = seconds["student"] / seconds["teacher"]
    predicted = {}
    for length in lengths:
        independent = speculative.expected_block_efficiency(result["acceptance_rate"], length)
        counted = result["lengths"][str(length)]["block_efficiency"]
        verification = seconds[f"verification {length}"] / seconds["teacher"]
        predicted[str(length)] = {
            "independent": speculative.predicted_speedup(independent, length, ratio),
            "counted": speculative.predicted_speedup(counted, length, ratio),
            "counted_with_verification": speculative.predicted_speedup(counted, length, ratio, verification),
            "verification_in_steps": verification,
        }
    return {
        "machine": costs.machine(device, spec.dtype),
        "prompts": len(prompts),
        "context": context,
        "step_seconds": {name: seconds[name] for name in ("teacher", "student")},
        "step_ratio": ratio,
        "predicted_speedup": predicted,
        **{kind: _speeds(kind, runs, lengths) for kind in ("greedy", "sampling")},
    }


def _speeds(kind: str, runs: dict[tuple[str, int | None], list[list[Generated]]], lengths: list[int]) -> dict[str, Any]:
    """Tokens a second of plain and assisted generation, by draft length."""

    def speeds(way: int | None) -> list[float]:
        return [sum(len(one.tokens) for one in r) / sum(one.seconds for one in r) for r in runs[kind, way]]

    plain = speeds(None)
    by_length: dict[str, Any] = {"plain": {"tokens_per_second": costs.spread(plain)}, "assisted": {}}
    for length in lengths:
        assisted, outputs = speeds(length), runs[kind, length][0]
        record = {
            "tokens_per_second": costs.spread(assisted),
            "speedup": costs.spread([a / b for a, b in zip(assisted, plain, strict=True)]),
            "block_efficiency": sum(len(one.tokens) for one in outputs) / sum(one.passes for one in outputs),
        }
        if kind == "greedy":
            same = [a.tokens == b.tokens for a, b in zip(outputs, runs[kind, None][0], strict=True)]
            record["identical"] = fmean(same)
            if not all(same):
                differing = f"{len(same) - sum(same)} of {len(same)} outputs differ from plain decoding"
                log.warning("draft length %d: %s, by rounding; none does in float32", length, differing)
        by_length["assisted"][str(length)] = record
    return by_length
