"""From folders to runs: walk the inputs of evaluated artifacts and say in plain words what was evaluated.

A run is one evaluated artifact with everything upstream flattened into dotted settings. Its `key` is the whole recipe
without the fine-tuning seed, so that runs with equal keys are one arm. Names that are not part of a recipe (a
dataset's name) are taken from the manifests' labels and never decide which runs are one arm.

Knows nothing of statistics or layout.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.planning.price import Price
from sdd.report.library import Artifact, Library, read_artifact
from sdd.report.price import Prices
from sdd.store import STAGES
from sdd.store.files import AGAIN, shown_json
from sdd.untrusted import check_shape

NO_TEACHER = (
    "retention is missing: it needs the unpruned model on the same evaluation. "
    "`python evaluate.py pruning=none finetune=none`, with the same evaluation settings, gives it."
)

TASK = re.compile(r"[\w(][\w .,:+@()=-]{0,199}")
"""Names of tasks, which name files of samples too."""
MOST_TASKS = 2_000
MOST_BLOCKS = 2_000
MOST_STEPS = 20
LONGEST_NAME = 200
RESULT: dict[str, Any] = {"value?": (float, None), "stderr?": (float, None), "n?": (int, None), "metric?": (str, None)}
RESULT |= {"lenient?": (float, None), "malformed?": (float, None), "weight_by_size?": bool}
RESULTS = {"tasks": {str: RESULT}, "likelihood?": ({"nll?": ({"value": float, "stderr?": (float, None)}, None)}, None)}
CUT: dict[str, Any] = {"metric?": (str, None), "removed_blocks?": ([int], None)}
CUT |= {"kept_blocks?": ([int], None), "ratio?": (float, None), "ratio_of?": (str, None), "flops_saved?": (float, None)}
CUT |= {"parameters_before?": (int, None), "parameters_after?": (int, None), "removed_of_student?": [int]}
SUMMARY = {"groups?": ({str: int}, None), "reasons?": {str: int}}


@dataclass
class Run:
    """One evaluated artifact and what it took to get there.

    `base` is the pruned address, None when unpruned; `cut` is the same, or where that is repaired, as it was before.
    """

    address: str
    path: Path
    key: str
    comparison: str
    kind: str  # teacher, pruned, tuned or merged
    finetune: str
    metric: str | None
    pruning: str
    blocks_removed: int | None  # None where channels were removed
    width: float  # share of the parameters that went with channels, as asked for
    dataset: str | None
    merge: str
    base: str | None
    cut: str | None
    tuned: frozenset[str]  # addresses of what was fine-tuned on the way: one, or the students of a merge
    seed: int | None
    groups: frozenset[str] | None
    settings: dict[str, Any]
    parameters: int | None
    flops_saved: float | None
    results: dict[str, Any]
    histories: list[Path] = field(default_factory=list)
    checkpoint: Path | None = None  # of the pruned model, with the tokenizer of all
    price: Price | None = None  # of what recovered it


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _recipe(address: str, library: Library, with_seed: bool) -> Any:
    """The nested recipe behind an address, with or without the seed of fine-tuning."""
    artifact = library.get(address)
    if artifact is None:
        return address
    drop = {"tuned": () if with_seed else ("seed",), "evaluated": ("served_as",)}.get(artifact.stage, ())
    spec = _without(artifact.spec, *drop)
    inputs = {name: _recipe(parent, library, with_seed) for name, parent in artifact.inputs.items()}
    return [artifact.stage, artifact.version, spec, inputs]


def flatten(spec: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names, as on the command line."""
    flat: dict[str, Any] = {}
    for name, value in spec.items():
        flat.update(flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def _joined(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """Settings of several artifacts side by side: the common value, or a list where they differ."""
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for flat in settings for name in flat):
        values = [flat.get(name) for flat in settings]
        joined[name] = values[0] if all(value == values[0] for value in values) else values
    return joined


def _without(spec: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in spec.items() if name not in names}


def _cut_settings(pruned: Artifact, library: Library) -> dict[str, Any]:
    """The settings of a cut and, if it was repaired, of its repair."""
    below = library.get(pruned.inputs.get("pruned", ""))
    cut = {} if below is None else _cut_settings(below, library)
    return cut | flatten(_without(pruned.spec, "model"), "pruning.")


def read_results(path: Path) -> dict[str, Any]:
    """What an evaluated artifact says of its tasks, numbers checked, and names that name no other file."""
    results: dict[str, Any] = shown_json(path, RESULTS)
    if len(results["tasks"]) > MOST_TASKS:
        raise UserError(f"{path}: more than {MOST_TASKS:,} tasks; {AGAIN}")
    for task in results["tasks"]:
        if not TASK.fullmatch(task) or ".." in task:
            raise UserError(f"{path}: {task[:80]!r} cannot be the name of a task")
    return results


def read_cut(path: Path) -> dict[str, Any]:
    """What a pruned model says of its cut."""
    cut: dict[str, Any] = shown_json(path, CUT)
    if max(len(cut.get(name) or []) for name in ("removed_blocks", "kept_blocks", "removed_of_student")) > MOST_BLOCKS:
        raise UserError(f"{path}: more than {MOST_BLOCKS:,} blocks; {AGAIN}")
    return cut


def one_line(text: Any) -> str:
    """A name of a stranger's as a word of an arm's."""
    return " ".join(str(text).split())[:LONGEST_NAME]


def _names(values: Iterable[Any]) -> str | None:
    names = list(dict.fromkeys(one_line(value) for value in values if value is not None))
    return "+".join(names) or None


def spans(blocks: list[int]) -> str:
    """Block numbers (or seeds) as text, runs of three or more shortened: [1, 4, 5, 6] -> '1,4-6'."""
    runs: list[list[int]] = []
    for block in sorted(blocks):
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _pruning_name(pruning: dict[str, Any], metric: str | None) -> str:
    """`n4`, `blocks 1,4-6`, `mlp20`, `n2+mlp20`; a share of the MLPs alone is `mlp30.7 of mlp`."""
    removed, ratio = pruning.get("removed_blocks") or [], pruning.get("ratio")
    listed = not metric or (ratio is not None and "+" not in metric)  # a cut of both has two criteria, or chosen blocks
    depth = (f"blocks {spans(removed)}" if listed else f"n{len(removed)}") if removed else ""
    if ratio is None:
        return depth
    width = f"mlp{100 * ratio:g}" + (" of mlp" if pruning["ratio_of"] == "mlp" else "")
    return f"{depth}+{width}" if depth else width


def _by_stage(artifacts: Iterable[Artifact]) -> dict[str, list[Artifact]]:
    by_stage: dict[str, list[Artifact]] = {stage: [] for stage in STAGES}
    for artifact in artifacts:
        by_stage[artifact.stage].append(artifact)
    between = {address for stage in ("pruned", "scores") for one in by_stage[stage] for address in one.inputs.values()}
    by_stage["pruned"] = [one for one in by_stage["pruned"] if one.address not in between]  # not those cut once more
    return by_stage


def _made_with(by_stage: dict[str, list[Artifact]], library: Library) -> dict[str, Any]:
    """The settings of how a student was made, dotted."""
    return {
        **_joined([_cut_settings(artifact, library) for artifact in by_stage["pruned"]]),
        **_joined([flatten(_without(artifact.spec, "model"), "scores.") for artifact in by_stage["scores"]]),
        **_joined([flatten(artifact.spec, "targets.") for artifact in by_stage["rewrites"]]),
        **_joined([flatten(_without(artifact.spec, "mode"), "targets.") for artifact in by_stage["targets"]]),
        **_joined([flatten(_without(artifact.spec, "model", "seed")) for artifact in by_stage["tuned"]]),
        **_joined([flatten(_without(artifact.spec, "model"), "distillation.") for artifact in by_stage["taught"]]),
        **_joined([flatten(artifact.spec, "merge.") for artifact in by_stage["merged"]]),
    }


def _earlier(pruned: list[Artifact], library: Library, left: int = MOST_STEPS) -> tuple[dict[str, Any], list[Artifact]]:
    """What students were cut further, as settings, and their tuned artifacts; nothing where none was.

    `pruning.after` names the cut of the student, and how it was recovered.
    """
    students = [library.get(cut.inputs["student"]) for cut in pruned if "student" in cut.inputs]
    settings, tuned = [], []
    for student in students:
        if student is None:
            continue
        if not left:
            raise UserError(f"{student.path}: cut in more than {MOST_STEPS} steps; {AGAIN}")
        by_stage = _by_stage(library.upstream(student, but=("student",)))
        earlier, before = _earlier(by_stage["pruned"], library, left - 1)
        cut = read_cut(by_stage["pruned"][0].path / "pruning.json") if by_stage["pruned"] else {}
        names = [_pruning_name(cut, cut.get("metric")), _names(one.spec.get("mode") for one in by_stage["targets"])]
        settings.append(
            {"pruning.after": " ".join(name for name in names if name)}
            | {f"pruning.after.{name}": value for name, value in {**earlier, **_made_with(by_stage, library)}.items()}
        )
        tuned += [*by_stage["tuned"], *before]
    return _joined(settings), tuned


def comparison_of(evaluated: Artifact, model: str | None) -> str:
    """What two runs must share to be compared: the unpruned model and every evaluation setting, but what a server calls
    the model."""
    return _digest([model, evaluated.version, _without(evaluated.spec, "model", "served_as")])


def read_run(evaluated: Artifact, library: Library) -> Run:
    """Flatten one evaluated artifact; LookupError names an input that is needed and not on disk."""
    upstream = library.upstream(evaluated)
    for artifact in upstream:
        for name, address in artifact.inputs.items():
            if name not in ("scores", "rewrites", "damaged", "surprisals", "taught") and library.get(address) is None:
                raise LookupError(f"{artifact.stage}/{artifact.address} lacks its input {name} ({address})")
    by_stage = _by_stage(library.upstream(evaluated, but=("student",)))
    pruned, tuned, targets, merged = (by_stage[stage] for stage in ("pruned", "tuned", "targets", "merged"))
    earlier, recovered = _earlier(pruned, library)
    model = next((a.spec["model"] for a in (*pruned, *tuned, evaluated) if a.spec.get("model")), None)
    for artifact in (*tuned, *recovered):
        check_shape(artifact.spec.get("seed"), (int, None), f"tuned/{artifact.address}: seed")
    seeds = {artifact.spec.get("seed") for artifact in tuned or recovered}
    pruning = read_cut(pruned[0].path / "pruning.json") if pruned else {}
    metric = pruning.get("metric") or (pruned[0].labels.get("metric") if pruned and pruned[0].inputs else None)
    metric = metric and one_line(metric)
    removed = pruning.get("removed_blocks") or []
    summaries = [shown_json(artifact.path / "summary.json", SUMMARY).get("groups") for artifact in targets]
    groups = frozenset(name for summary in summaries if summary for name, count in summary.items() if count)
    labels = [artifact.labels.get("dataset") or artifact.spec.get("dataset") for artifact in targets]
    settings = {
        "model": evaluated.labels.get("model") or model,
        **flatten(_without(evaluated.spec, "model", "served_as"), "evaluation."),
        **earlier,
        **_made_with(by_stage, library),
        **{f"{artifact.stage}.version": artifact.version for artifact in upstream},
    }
    return Run(
        address=evaluated.address,
        path=evaluated.path,
        key=_digest(_recipe(evaluated.address, library, with_seed=len(seeds) > 1)),
        comparison=comparison_of(evaluated, model),
        kind="merged" if merged else "tuned" if tuned else "pruned" if pruned else "teacher",
        finetune=_names(artifact.spec.get("mode") for artifact in targets) or "none",
        metric=metric,
        pruning=_pruning_name(pruning, metric) if pruned else "none",
        blocks_removed=len(removed) if removed or not pruned else None,
        width=float(pruning.get("ratio") or 0),
        dataset=_names(label for label in labels if isinstance(label, str)),
        merge=one_line(merged[0].spec.get("method", "merged")) if merged else "none",
        base=pruned[0].address if pruned else None,
        cut=pruned[0].inputs.get("pruned", pruned[0].address) if pruned else None,
        tuned=frozenset(artifact.address for artifact in tuned),
        seed=next(iter(seeds)) if len(seeds) == 1 else None,
        groups=groups if any(summary is not None for summary in summaries) else None,
        settings=settings,
        parameters=pruning.get("parameters_after"),
        flops_saved=pruning.get("flops_saved") if pruned else 0.0,
        results=read_results(evaluated.path / "results.json"),
        histories=[artifact.path / "history.csv" for artifact in tuned] if not merged else [],
        checkpoint=pruned[0].path if pruned else None,
    )


def collect(evaluated: list[Path], library: Library) -> tuple[list[Run], list[str]]:
    """Runs of the given folders, joined by the unpruned model's where it lies in the same artifacts; and notes."""
    runs: dict[str, Run] = {}
    notes: list[str] = []
    prices = Prices(library)
    for path in evaluated:
        try:
            artifact = read_artifact(path)
            run = read_run(artifact, library)
        except LookupError as error:
            notes.append(f"left out: {error}.")
            continue
        if run.address not in runs:
            run.price = prices.of(artifact)
            runs[run.address] = run
    without_teacher = {run.comparison for run in runs.values()} - {
        run.comparison for run in runs.values() if run.kind == "teacher"
    }
    for artifact in library.evaluated() if without_teacher else []:
        if not artifact.inputs.get("model") and comparison_of(artifact, artifact.spec.get("model")) in without_teacher:
            runs[artifact.address] = read_run(artifact, library)
            without_teacher.discard(runs[artifact.address].comparison)
    if without_teacher:
        notes.append(NO_TEACHER)
    sizes = [(run.settings["model"], run) for run in runs.values() if run.base]
    for run in runs.values():
        if run.parameters is None and not run.base:
            same = next((other for model, other in sizes if model == run.settings["model"]), None)
            run.parameters = _parameters_before(same, library) if same else None
    return list(runs.values()), notes


def _parameters_before(run: Run, library: Library) -> int | None:
    pruned = library.get(run.base or "")
    return read_cut(pruned.path / "pruning.json").get("parameters_before") if pruned else None
