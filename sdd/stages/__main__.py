"""Rebuild one artifact from its manifest and compare: is what lies there still what the recipe makes?

    python -m sdd.stages rerun ADDRESS [--artifacts DIR] [--source DIGEST=PATH]

Exit code 0 if every file is identical, 1 if one differs. Its inputs are taken from the store as they are. Timings are
no content and are not compared.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from sdd.allowed import build
from sdd.data.texts import conversation
from sdd.data.tiny import TinyTexts
from sdd.errors import UserError
from sdd.stages import builds
from sdd.stages.runtime import Runtime
from sdd.stages.sources import add_arguments, runtime_of
from sdd.store import TIMINGS, Recipe, Store, file_digest, read_manifest


def recipe_of(store: Store, manifest: dict[str, Any]) -> Recipe:
    """The recipe that a manifest records, inputs included."""
    inputs = {name: recipe_of(store, read_manifest(store.find(a))) for name, a in manifest["inputs"].items()}
    return Recipe(manifest["stage"], manifest["version"], manifest["spec"], inputs, manifest["labels"])


def find_texts(runtime: Runtime, recipe: Recipe, num_texts: int) -> None:
    """Put the calibration texts of a recipe into the runtime: embedded, from the hub, of a dataset, or of a source."""
    spec, digest = recipe.spec, recipe.spec["texts"]
    if "dataset" in spec:
        from sdd.stages.rows import read_examples

        runtime.texts[digest] = [conversation(e) for e in read_examples(runtime, spec["dataset"])[:num_texts]]
        return
    path = runtime.sources.get(digest)
    if "source" in spec:
        source = build(spec["source"])
    elif path is None:
        source = TinyTexts(num_texts)
    else:
        node = json.loads(recipe.labels.get("calibration", '{"_target_": "sdd.data.texts.LocalTexts"}'))
        source = build(node, num_texts=num_texts, path=str(path))
    if source.spec()["texts"] != digest:
        raise UserError(f"the calibration texts {digest} are not at hand; name the file with --source {digest}=PATH")
    runtime.texts[digest] = source.texts()


def _num_texts(folder: Path) -> int:
    """The number of calibration texts that the scores, or the repair, in a folder were made of."""
    if (folder / "scores.json").is_file():
        return int(json.loads((folder / "scores.json").read_text())["num_texts"])
    return int(json.loads((folder / "pruning.json").read_text())["repair"]["num_texts"])


def rerun(store: Store, address: str, runtime: Runtime) -> list[str]:
    """What differs between the artifact and a fresh build of its recipe; empty if nothing does."""
    folder = store.find(address)
    manifest = read_manifest(folder)
    recipe = recipe_of(store, manifest)
    if recipe.address != manifest["address"]:
        raise UserError(f"{folder}: the manifest's recipe has address {recipe.address}; was the manifest edited?")
    if "texts" in recipe.spec:
        find_texts(runtime, recipe, _num_texts(folder))
    if "config" in manifest:
        runtime = dataclasses.replace(runtime, **Runtime.sizes(manifest["config"]))
    inputs = {name: store.folder(upstream) for name, upstream in recipe.inputs.items()}
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary)
        builds(runtime)[recipe.stage].function(recipe, inputs, fresh)
        recorded: dict[str, str] = manifest["files"]
        differing = []
        for name in sorted(set(recorded) - {TIMINGS}):
            path = fresh / name
            if not path.is_file():
                differing.append(f"not made: {name}")
            elif file_digest(path) != recorded[name]:
                differing.append(f"differs: {name}")
    return differing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdd.stages", description="Rebuild an artifact and compare.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("rerun", help="rebuild one artifact from its manifest")
    command.add_argument("address")
    add_arguments(command)
    arguments = parser.parse_args(argv)
    try:
        differing = rerun(Store(arguments.artifacts.absolute()), arguments.address, runtime_of(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(differing) if differing else "identical")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
