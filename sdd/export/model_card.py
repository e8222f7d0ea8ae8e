"""The page of an exported model, in the form of the Hugging Face hub: front matter, then what a reader has to know.

What was removed, on what data the rest was tuned, how much quality is left where that was measured beside the unpruned
model, whose licence applies, and the command and config that made it. Every number is read from the artifacts.
"""

import contextlib
import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sdd.errors import UserError
from sdd.finetuning.modes import MODES
from sdd.models.hub import PAGE, checkpoint_folder, is_hub_id
from sdd.stages.runtime import Runtime
from sdd.store import Store, read_manifest
from sdd.store.files import read_facts
from sdd.untrusted import ANY, as_block, as_code, as_markdown, check_inside, check_shape, cleaned

TUNED = {"finetune": {"epochs": int, "learning_rate": float, "batch_size": int}, "seed": int}
SPECS = {
    "pruned": {"model?": str},
    "targets": {"mode": str},
    "tuned": {**TUNED, "model?": str},
    "merged": {"method": str},
    "evaluated": {"suite": str},
}
"""What the page says of recipes, by stage."""
HELD_OUT = {"before": float, "after": float}
CUT: dict[str, Any] = {
    "removed_blocks": [int],
    "kept_blocks": [int],
    "parameters_before": int,
    "parameters_after": int,
    "metric?": (str, None),
    "width_before?": int,
    "width_after?": int,
    "removed_of_mlp?": float,
    "removed_of_student?": [int],
    "repair?": (
        {"method": str, "penalty": float, "tokens_fitted": int, "cuts": [{"block": int, "held_out": HELD_OUT}]},
        None,
    ),
}
RESULT = {"value": float, "stderr?": (float, None), "metric": str, "n": int}
FILES = {
    "pruning.json": CUT,
    "rows.json": {"trained": int, "target_tokens": int},
    "summary.json": {"reasons?": {str: int}},
    "merging.json": {"note": str},
    "results.json": {"tasks": {str: RESULT}},
}
"""What the page says of files, by name."""
LARGEST_PAGE = 4 << 20


@dataclass(frozen=True)
class Lineage:
    """An artifact and all that it was made from, a manifest and a folder for each stage; `digest` is the base model's.

    `config` and `command` are those of the job that built it; empty for artifacts of before they were recorded.
    `students` are those of a merged artifact, each with its own data.
    """

    address: str
    digest: str
    folders: dict[str, Path]
    manifests: dict[str, dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    students: tuple["Lineage", ...] = ()

    @property
    def own(self) -> dict[str, Any]:
        """The artifact's manifest, the first that was read."""
        return next(iter(self.manifests.values()))

    def read(self, stage: str, name: str) -> dict[str, Any]:
        """A JSON file of the artifact of a stage; empty where there is none."""
        return _facts(self.folders[stage], name) if stage in self.folders else {}


def _facts(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of an artifact, in the shape that the page needs."""
    check_inside(folder / name, folder, f"{folder / name}")
    facts: dict[str, Any] = cleaned(read_facts(folder / name, FILES[name]))
    return facts


def lineage(store: Store, folder: Path) -> Lineage:
    manifests: dict[str, dict[str, Any]] = {}
    folders: dict[str, Path] = {}
    queue, seen = [folder], set()
    while queue:
        place = queue.pop(0)
        if place in seen:
            continue
        seen.add(place)
        manifest = cleaned(store.manifest(place))
        check_shape(manifest["spec"], SPECS.get(manifest["stage"], ANY), f"{place}: its recipe")
        manifests.setdefault(manifest["stage"], manifest)  # the last of its stage, not what that was made from
        folders.setdefault(manifest["stage"], place)
        queue += [store.find(address) for address in manifest["inputs"].values()]
    own = cleaned(store.manifest(folder))
    stages = [stage for stage in ("pruned", "tuned") if stage in manifests and "model" in manifests[stage]["spec"]]
    if not stages:
        raise UserError(f"{folder}: no recipe of it names the unpruned model")
    digest = str(manifests[stages[0]]["spec"]["model"])
    merged = sorted(own["inputs"].items()) if own["stage"] == "merged" else ()
    made_of = [store.find(address) for _, address in merged]
    students = tuple(lineage(store, place) for place in made_of if place.parent.name == "tuned")
    return Lineage(folder.name, digest, folders, manifests, own.get("config", {}), own.get("command", ""), students)


def base_name(line: Lineage) -> str | None:
    """The hub id of the unpruned model, if it came from there."""
    path = _path(line)
    return path if is_hub_id(path) else None


def _path(line: Lineage) -> str:
    model = line.config.get("model")
    return str(model.get("path") or "") if isinstance(model, dict) else ""


def base_page(line: Lineage, runtime: Runtime) -> dict[str, Any]:
    """The front matter of the unpruned model's own page, where it lies on this machine."""
    from huggingface_hub import metadata_load

    folder = runtime.sources.get(line.digest)
    name = base_name(line)
    if folder is None and name is not None:
        revision = line.config["model"].get("revision")
        with contextlib.suppress(UserError):
            folder = checkpoint_folder(name, revision if isinstance(revision, str) else None, fetch=False)
    if folder is None or not (folder / PAGE).is_file() or (folder / PAGE).stat().st_size > LARGEST_PAGE:
        return {}
    try:
        page = metadata_load(folder / PAGE)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError):
        return {}
    return {key: page[key] for key in STATED if _is_stated(page.get(key))} if isinstance(page, dict) else {}


STATED = ("license", "license_name", "license_link", "language")


def _is_stated(value: Any) -> bool:
    """Whether what a page states is a name, a list of names, or a plain link to a page."""
    if isinstance(value, list):
        return 0 < len(value) <= 300 and all(isinstance(one, str) and _is_stated(one) for one in value)
    return isinstance(value, str) and re.fullmatch(r"[\w][\w .,+()-]{0,99}|https://[\w./%+-]{1,300}", value) is not None


def front_matter(line: Lineage, page: dict[str, Any]) -> Any:
    """`ModelCardData`: base, licence, datasets, and what kind of model it is."""
    from huggingface_hub import ModelCardData

    tuned = "tuned" in line.manifests
    licence = {key: page[key] for key in ("license", "license_name", "license_link") if page.get(key)}
    base = base_name(line)
    if "license" not in licence:
        licence = {"license": "other", "license_name": "see-the-base-model"}
    made_of = line.students or (line,)
    datasets = [name for one in made_of for name in repositories(one.config.get("dataset"))] if tuned else []
    modes = {_mode(one) for one in made_of}
    return ModelCardData(
        base_model=base,
        datasets=list(dict.fromkeys(datasets)) or None,
        language=page.get("language"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pruned", *(["self-data-distillation"] if modes == {"self_distill"} else []), *_merge_tag(line)],
        **licence,
    )


def repositories(dataset: Any) -> list[str]:
    """The hub repositories that a dataset's settings name, those of a mixture's parts included."""
    if not isinstance(dataset, dict):
        return []
    hub, parts = dataset.get("hub"), dataset.get("parts")
    named = hub.get("repository") if isinstance(hub, dict) else None
    own = [named] if isinstance(named, str) and is_hub_id(named) and not dataset.get("path") else []
    return own + [name for part in (parts.values() if isinstance(parts, dict) else ()) for name in repositories(part)]


def _merge_tag(line: Lineage) -> list[str]:
    return ["merge"] if line.students else []


def _mode(line: Lineage) -> str | None:
    return line.manifests["targets"]["spec"]["mode"] if "targets" in line.manifests else None


def model_card(store: Store, folder: Path, runtime: Runtime) -> str:
    """The whole page of the artifact in `folder`."""
    from huggingface_hub import ModelCard

    line = lineage(store, folder)
    page = base_page(line, runtime)
    parts = [_removed(line), _tuning(line), _retention(store, line), _licence(line, page), _making(line)]
    text = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{front_matter(line, page).to_yaml()}\n---\n\n{text}\n"))


def _removed(line: Lineage) -> str:
    base, facts = base_name(line), line.read("pruned", "pruning.json")
    plain = base.split("/")[1] if base else Path(_path(line) or "a model").name
    name = as_markdown(plain)
    of = f"[{base}](https://huggingface.co/{base})" if base else f"the checkpoint {as_code(plain)}"
    if not facts:
        return f"# {name}, fine-tuned\n\nMade from {of}, of which nothing was removed."
    removed, blocks = facts["removed_blocks"], len(facts["removed_blocks"]) + len(facts["kept_blocks"])
    before, after = facts["parameters_before"], facts["parameters_after"]
    titles, ways, lines = [], [], []
    of_blocks, of_channels = _criteria(facts)
    if removed:
        titles.append(f"without {len(removed)} of {blocks} blocks")
        ways.append("whole transformer blocks")
        lines.append(f"Blocks {', '.join(map(str, removed))} of 0 to {blocks - 1}{of_blocks}.")
        if last := facts.get("removed_of_student"):
            lines.append(f"They went in steps: the last {len(last)} out of a student without the others.")
    if "width_after" in facts:
        old, new = facts["width_before"], facts["width_after"]
        titles.append(f"with {new} of {old} MLP channels")
        ways.append("channels of every MLP")
        share = f"{100 * facts['removed_of_mlp']:.1f}% of the MLPs' weights"
        lines.append(
            f"{old - new} of the {old} channels of every remaining block's MLP ({share}){of_channels}: "
            f"intermediate_size is {new}."
        )
    return (
        f"# {name} {' and '.join(titles)}\n\n"
        f"Made from {of} by removing {' and '.join(ways)}.\n\n## What was removed\n\n"
        f"{' '.join(lines)} Parameters: {before:,} before, {after:,} "
        f"after ({100 * (before - after) / before:.2f}% removed)." + _repaired(facts)
    )


def _criteria(facts: dict[str, Any]) -> tuple[str, str]:
    """Words on what chose the blocks and on what chose the channels, stored as one name; empty where nothing did."""
    blocks, channels = facts.get("metric") or "", ""
    if "width_after" in facts:
        blocks, _, channels = blocks.rpartition("+")
    blocks, channels = as_markdown(blocks), as_markdown(channels)
    return f", chosen by {blocks}" if blocks else "", f", chosen by {channels}" if channels else ""


def _repaired(facts: dict[str, Any]) -> str:
    """A paragraph on what was done at the cuts without training; empty if nothing was."""
    repair = facts.get("repair")
    if not repair:
        return ""
    errors = "; ".join(
        f"before the cut after block {cut['block']}, {cut['held_out']['before']:.3f} became "
        f"{cut['held_out']['after']:.3f}"
        for cut in repair["cuts"]
    )
    return (
        "\n\nThen, without training, the last projection of the MLP before each cut was refitted to lead to the states "
        f"behind the cut ({as_markdown(repair['method'])} regression, penalty {repair['penalty']:g}, "
        f"{repair['tokens_fitted']:,} tokens of calibration texts). Relative error of those states on texts held out: "
        f"{errors}."
    )


def _tuning(line: Lineage) -> str:
    if "tuned" not in line.manifests:
        if "repair" in line.read("pruned", "pruning.json"):
            return "## Data\n\nThe calibration texts of the repair; nothing was trained afterwards."
        return "## Data\n\nNone: the model was pruned and nothing was trained afterwards."
    if line.manifests["tuned"] is not line.own and not line.students:
        return _data(line, "Data") + "\n\nThat was before the last cut; nothing was trained afterwards."
    if line.students:
        return "\n\n".join([_merging(line), *(_data(one, f"Student {n}") for n, one in enumerate(line.students))])
    return _data(line, "Data")


def _merging(line: Lineage) -> str:
    spec, facts = line.manifests["merged"]["spec"], line.read("merged", "merging.json")
    settings = as_markdown(", ".join(f"{key} {value}" for key, value in spec.items() if key != "method"))
    return (
        f"## Merging\n\n{len(line.students)} students of the pruned model were merged by "
        f"{as_markdown(spec['method'])} ({settings}); {as_markdown(facts['note'])}."
    )


def _data(line: Lineage, title: str) -> str:
    """What one student was trained on."""
    spec, rows = line.manifests["tuned"]["spec"], line.read("tuned", "rows.json")
    dataset, mode = line.manifests["tuned"]["labels"].get("dataset", "a dataset"), _mode(line)
    reasons = line.read("targets", "summary.json").get("reasons", {})
    counted = as_markdown(", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items())))
    settings = spec["finetune"]
    lines = [
        f"Tuned on {as_code(dataset)}: {MODES[mode].words if mode in MODES else as_markdown(str(mode))}.",
        f"{rows['trained']:,} rows, {rows['target_tokens']:,} target tokens, {settings['epochs']} epochs, learning "
        f"rate {settings['learning_rate']:g}, {settings['batch_size']} rows a step, seed {spec['seed']}.",
        f"Targets of all rows by what became of them: {counted}.",
    ]
    return f"## {title}\n\n" + "\n".join(lines)


def evaluated_pairs(store: Store, line: Lineage) -> list[tuple[Path, Path]]:
    """Evaluations of the artifact, each with the unpruned model's on exactly the same tasks and settings."""
    evaluations = [(folder, store.manifest(folder)) for folder in store.folders() if folder.parent.name == "evaluated"]
    pairs = []
    for folder, manifest in evaluations:
        if manifest["inputs"].get("model") != line.address:
            continue
        same = {**manifest["spec"], "model": line.digest}
        pairs += [
            (folder, other) for other, teacher in evaluations if teacher["spec"] == same and not teacher["inputs"]
        ]
    return pairs


def _retention(store: Store, line: Lineage) -> str:
    tables = [_table(*pair) for pair in evaluated_pairs(store, line)]
    if not tables:
        return "## How much is left\n\nNot measured beside the unpruned model on the machine that wrote this page."
    return "## How much is left\n\n" + "\n\n".join(tables)


def _table(student: Path, teacher: Path) -> str:
    mine, whole = (_facts(folder, "results.json")["tasks"] for folder in (student, teacher))
    if not mine or not set(mine) <= set(whole):
        raise UserError(f"{student} and {teacher} are not results of the same tasks")
    spec = cleaned(read_manifest(student)["spec"])
    check_shape(spec, {"suite": str, "limit?": (int, None)}, f"{student}: its recipe")
    limit = "" if spec.get("limit") is None else f", at most {spec['limit']} items a task"
    lines = [
        f"{as_code(spec['suite'])}{limit}; value ± standard error.",
        "",
        "| task | metric | n | unpruned | this model | retention |",
        "|---|---|---|---|---|---|",
    ]
    kept = []
    for name, result in mine.items():
        before, after = whole[name]["value"], result["value"]
        share = f"{100 * after / before:.1f}%" if before else "-"
        if before:
            kept.append(after / before)
        cells = (
            as_markdown(name),
            as_markdown(result["metric"]),
            str(result["n"]),
            _shown(whole[name]),
            _shown(result),
            share,
        )
        lines.append(f"| {' | '.join(cells)} |")
    before, after = (statistics.fmean(one["value"] for one in results.values()) for results in (whole, mine))
    if before:
        lines.append(f"| mean | | | {before:.4f} | {after:.4f} | {100 * after / before:.1f}% |")
    if kept:
        lines += ["", f"Mean of the tasks' own retentions: {100 * statistics.fmean(kept):.1f}%."]
    return "\n".join(lines)


def _shown(result: dict[str, Any]) -> str:
    error = result.get("stderr")
    return f"{result['value']:.4f}" + (f" ± {error:.4f}" if isinstance(error, int | float) else "")


def _licence(line: Lineage, page: dict[str, Any]) -> str:
    base = base_name(line)
    of = f"[the base model](https://huggingface.co/{base})" if base else "the base model"
    stated = as_markdown(str(page.get("license_name") or page.get("license") or ""))
    return f"## Licence\n\nThat of {of}: " + (
        f"{stated}." if stated else "see there; it was not found on the machine that wrote this page."
    )


def _making(line: Lineage) -> str:
    own = line.own
    versions = as_markdown(", ".join(f"{name} {version}" for name, version in own.get("versions", {}).items()))
    lines = [
        "## How it was made",
        "",
        f"Artifact `{own['stage']}/{line.address}`, base model digest {as_code(line.digest)}, commit "
        f"{as_code(str(own.get('commit')))} of the code; {versions}.",
    ]
    if line.command:
        config = yaml.safe_dump(line.config, sort_keys=False, allow_unicode=True).rstrip()
        lines += ["", *as_block(line.command), "", "The composed config:", "", *as_block(config, "yaml")]
    else:
        lines += ["", "Its recipe:", "", *as_block(json.dumps(own["spec"], indent=1, ensure_ascii=False), "json")]
    return "\n".join(lines)
