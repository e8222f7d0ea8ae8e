"""Every address there was, pinned: artifacts that somebody made must be found again, whatever moves in the house.

`golden/addresses.json` holds the artifacts of the whole study of the embedded model, one walk for every option of every
group and every setting of `test_addresses`. What is new has no address to keep. A stage's version may rise for a reason
that the log names; then write it anew: `python tests/system/test_golden_addresses.py`.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from test_addresses import IN_KEY, NOT_IN_KEY

from sdd.cli.loader import config_folder, own_loader
from sdd.errors import UserError
from sdd.stages import graph
from sdd.study import Study

GOLDEN = Path(__file__).parent / "golden" / "addresses.json"
NEEDED = {
    "metric": {name: ["pruning=mlp20"] for name in ("sdm", "taylor_width", "activation_width", "magnitude_width")}
    | {"random_width": ["pruning=mlp20"]},
    "dataset": {"local": ["dataset.path=ROWS"]},
    "calibration": {"local": ["calibration.path=TEXTS"]},
    "model": {"local": ["model.path=sdd/tiny/teacher"]},
    "trainer": {"fsdp": ["trainer.devices=2"]},
}
"""What some options want beside them."""
WITH_STUDENTS = ("merge", "merging")
LOCAL = {
    "ROWS": [{"prompt": f"What is {n} + {n}?", "reference": str(2 * n)} for n in range(700)],
    "TEXTS": [{"text": f"The number {n} follows {n - 1}."} for n in range(200)],
}
SMALL = ["evaluation.limit=3", "dataset.num_rows=140", "finetune.num_rows=null", "finetune.validation_rows=4"]
"""Drawing thousands of rows takes most of the time otherwise."""
MODELS = ("tiny", "local", "llama3.1_8b_instruct", "gemma3_1b_instruct")
"""Of the options of `model`, which are alike."""
EXPERIMENTS = (
    "demo",
    "criteria",
    "criteria_width",
    "merging",
    "tune",
    "paper/cell",
    "ablations/base",
    "ablations/tries",
)
"""Of the experiments, which choose among the options."""
STUDENTS = [["dataset=tiny_math"], ["dataset=tiny_instruct"]]


def options() -> Iterator[tuple[str, list[str]]]:
    """(name, words) of every option of every group, and of every experiment."""
    for path in sorted(config_folder().glob("*/**/*.yaml")):
        group, _, option = str(path.relative_to(config_folder()).with_suffix("")).partition("/")
        if group == "hydra" or option not in {"model": MODELS, "experiment": EXPERIMENTS}.get(group, (option,)):
            continue
        yield f"{group}={option}", [*NEEDED.get(group, {}).get(option, []), f"{group}={option}"]
    for name in ("sdm", "taylor_width", "random_width"):
        yield f"width {name}", ["pruning=n2", f"metric@width_metric={name}", "pruning.ratio=0.2"]
    yield "repaired", ["repair=ridge", "finetune=sft"]
    for kind in ("speculative", "shift", "cost"):
        yield f"{kind} of a pruned model", [f"analysis={kind}", "finetune=none"]


def settings() -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """(name, groups, values) of the cases that say what is in a key and what is not."""
    cases = [(key, value, groups, shared) for key, value, _, groups, shared in IN_KEY]
    for key, value, groups, shared in [*cases, *NOT_IN_KEY]:
        plain = sorted(value) if isinstance(value, set) else value
        yield f"{groups} {shared} {key}={plain}", groups, {**shared, key: value}


def walked(config: Any, memory: Path, students: list[Study]) -> list[str]:
    """The artifacts of the study, inputs first, as stage/address; the refusal where there is none."""
    config.dry_run = True  # what would have to be fetched has a stand-in
    try:
        wanted = graph.wanted(Study(config, memory, students), "evaluate")
    except UserError as error:
        return [f"refused: {error}"]
    return [] if wanted is None else [f"{recipe.stage}/{recipe.address}" for recipe in wanted.walk()]


def all_addresses(folder: Path) -> dict[str, list[str]]:
    """Every case; `folder` is for the digests and the local files."""
    for name, rows in LOCAL.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: dict[str, list[str]] = {}
    composed: dict[tuple[str, ...], Any] = {}
    loader = own_loader()

    def config(words: list[str]) -> Any:
        words = words if words and words[-1].startswith("experiment=") else [*SMALL, *words]
        placed = [re.sub("(ROWS|TEXTS)$", lambda name: str(folder / name[0]), word) for word in words]
        if tuple(placed) not in composed:
            made = loader.load_configuration("config", placed, RunMode.RUN)
            with open_dict(made):
                del made["hydra"]
            composed[tuple(placed)] = made
        return composed[tuple(placed)].copy()

    for name, words in options():
        students = []
        if name.startswith(WITH_STUDENTS) or name == "experiment=merging":
            students = [Study(config(student), folder / "digests") for student in STUDENTS]
        found[name] = walked(config(words), folder / "digests", students)
    for name, groups, values in settings():
        changed = config(groups)
        for key, value in values.items():
            OmegaConf.update(changed, key, value, force_add=True)
        found[name] = walked(changed, folder / "digests", [])
    return found


def test_addresses_are_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config_folder().parent)
    golden = json.loads(GOLDEN.read_text())
    found = json.loads(json.dumps(all_addresses(tmp_path)))
    assert len(golden) > 200
    assert golden.keys() <= found.keys()
    moved = {name: (golden[name], found[name]) for name in golden if golden[name] != found[name]}
    assert moved == {}


if __name__ == "__main__":
    import os
    import tempfile

    os.chdir(config_folder().parent)
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(json.dumps(all_addresses(Path(temporary)), indent=0) + "\n")
