"""Rebuild one artifact from its manifest and compare: is what lies there still what the recipe makes?

    python -m sdd.stages rerun ADDRESS [--artifacts DIR] [--source DIGEST=PATH]

Exit code 0 if every file is identical, 1 if one differs. Its inputs are taken from the store as they are. Timings are
no content and are not compared.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdd.config.allowed import build
from sdd.config.own import allow
from sdd.data.texts import conversation
from sdd.data.tiny import TinyTexts
from sdd.errors import UserError
from sdd.stages import builder
from sdd.stages.runtime import Runtime
from sdd.stages.sources import add_arguments, runtime_of
from sdd.store import TIMINGS, Recipe, Store, file_digest
from sdd.store.files import read_facts
from sdd.store.recipe import address_of
from sdd.untrusted import check_shape, parse_json, printable, tell_error

SIZES = {
    "trainer": {"micro_batch_tokens": int, "inference_batch_size": int, "attention": str},
    "engine": {"batch_size?": (int, None)},
    "evaluation": {"batch_size": int},
}
"""What a config in a manifest says of how much goes into one pass, and of its attention."""
ATTENTION = ("eager", "sdpa")
"""Kinds of it that run here; what another one was made by is rebuilt by the usual one, and rounded otherwise."""


MOST_INPUTS = 500
"""Artifacts, counted once for each way to them, that one is made from; about twenty for a merge of three students."""


DEEPEST = 40
"""Artifacts from one to the first of its inputs."""


def recipe_of(store: Store, manifest: dict[str, Any], left: Iterator[int] | None = None, depth: int = 0) -> Recipe:
    """The recipe that a manifest records, inputs included."""
    left = left or iter(range(MOST_INPUTS))
    if next(left, None) is None or depth > DEEPEST:
        raise UserError(f"{manifest['stage']}/{manifest['address']}: inputs without an end; was the manifest edited?")
    if address_of(*(manifest[key] for key in ("stage", "version", "spec", "inputs"))) != manifest["address"]:
        raise UserError(
            f"{manifest['stage']}/{manifest['address']}: the manifest's recipe has another address; was it edited?"
        )
    manifests = {name: store.manifest(store.find(address)) for name, address in manifest["inputs"].items()}
    inputs = {name: recipe_of(store, upstream, left, depth + 1) for name, upstream in manifests.items()}
    return Recipe(manifest["stage"], manifest["version"], manifest["spec"], inputs, manifest["labels"])


def find_texts(runtime: Runtime, recipe: Recipe, num_texts: int) -> None:
    """Put the calibration texts of a recipe into the runtime: embedded, from the hub, of a dataset, or of a source."""
    spec, digest = recipe.spec, recipe.spec["texts"]
    if "dataset" in spec:
        from sdd.stages.datasets import read_examples

        runtime.texts[digest] = [conversation(e) for e in read_examples(runtime, spec["dataset"])[:num_texts]]
        return
    path = runtime.sources.get(digest)
    if "source" in spec:
        source = build(spec["source"])
    elif path is None:
        source = TinyTexts(num_texts)
    else:
        label = recipe.labels.get("calibration", '{"_target_": "sdd.data.texts.LocalTexts"}')
        node = parse_json(label, "the manifest's label calibration")
        check_shape(node, {"_target_": str}, "the manifest's label calibration")
        source = build(node, num_texts=num_texts, path=str(path))
    if source.spec()["texts"] != digest:
        raise UserError(f"the calibration texts {digest} are not at hand; name the file with --source {digest}=PATH")
    runtime.texts[digest] = source.texts()


def _num_texts(folder: Path) -> int:
    """The number of calibration texts that the scores, or the repair, in a folder were made of."""
    if (folder / "scores.json").is_file():
        return int(read_facts(folder / "scores.json", {"num_texts": int})["num_texts"])
    return int(read_facts(folder / "pruning.json", {"repair": {"num_texts": int}})["repair"]["num_texts"])


def rerun(store: Store, address: str, runtime: Runtime) -> list[str]:
    """What differs between the artifact and a fresh build of its recipe; empty if nothing does."""
    folder = store.find(address)
    manifest = store.manifest(folder)
    recipe = recipe_of(store, manifest)
    if "texts" in recipe.spec:
        find_texts(runtime, recipe, _num_texts(folder))
    if "config" in manifest:
        check_shape(manifest["config"], SIZES, f"{folder}/manifest.json: config")
        runtime = dataclasses.replace(runtime, **Runtime.sizes(manifest["config"]))
        if (attention := manifest["config"]["trainer"]["attention"]) in ATTENTION:
            runtime = dataclasses.replace(runtime, attention=attention)
    inputs = {name: store.folder(upstream) for name, upstream in recipe.inputs.items()}
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary)
        builder(runtime)(recipe, inputs, fresh)
        return differing(manifest["files"], fresh)


def differing(recorded: Mapping[str, str], folder: Path) -> list[str]:
    """Which of the files that a manifest records are not in a folder, or have other bytes there."""
    lines = []
    for name in sorted(set(recorded) - {TIMINGS}):
        path = folder / name
        if not path.is_file():
            lines.append(f"not made: {name}")
        elif file_digest(path) != recorded[name]:
            lines.append(f"differs: {name}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdd.stages", description="Rebuild an artifact and compare.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("rerun", help="rebuild one artifact from its manifest")
    command.add_argument("address")
    add_arguments(command)
    command.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="CLASS",
        help="import path of a class of your own that it is made by",
    )
    arguments = parser.parse_args(argv)
    try:
        for path in arguments.allow:
            allow(path)
        lines = rerun(Store(arguments.artifacts.absolute()), arguments.address, runtime_of(arguments))
    except UserError as error:
        return tell_error(error)
    print("\n".join(map(printable, lines)) if lines else "identical")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
