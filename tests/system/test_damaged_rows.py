"""A student of the rows that the cut hurt most, from the command line to its artifact made again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launching import artifacts_of, run
from omegaconf import DictConfig, open_dict

from sdd.config import check_values
from sdd.errors import UserError
from sdd.forward import parts
from sdd.forward.parts import Parts
from sdd.stages.__main__ import main as stages
from sdd.store import SCRATCH
from sdd.store.files import read_jsonl

QUICK = ["finetune=sft", "metric=last", "pruning=n1", "finetune.epochs=1", "dataset=tiny_instruct"]
DRAW = ["finetune.num_rows=null", "finetune.num_tokens=600", "finetune.deduplicate=0.9"]
BY_DAMAGE = ["finetune.choose=damage", "finetune.choose_temperature=0.0"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workplace")


def trained(outcome: Any) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((outcome.path / "rows.json").read_text())
    return facts


class Killed(BaseException):
    """What ends a process."""


def kill_in_the_middle(words: list[str], workplace: Path, stage: str) -> None:
    """Have a command end when it has written down the second batch of a stage, which is then in its scratch folder."""
    write, kept = Parts.write, f"artifacts/.partial/{stage}/*/{SCRATCH}/*.parts"

    def writing(self: Parts) -> None:
        write(self)
        if any(len(file.read_text().splitlines()) > 4 for file in workplace.glob(kept)):
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(parts, "EVERY", 0.0)
        patch.setattr(Parts, "write", writing)
        run("train", *words, cwd=workplace)
    assert list(workplace.glob(kept))


def test_the_most_damaged_rows_at_equal_tokens(
    small: list[str], workplace: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what is killed while it measures the damage goes on, and ends with the same bytes."""
    random = run("train", *small, *QUICK, *DRAW, cwd=workplace)
    words = [*small, *QUICK, *DRAW, *BY_DAMAGE]
    for stage in ("surprisals", "damaged"):
        kill_in_the_middle(words, workplace, stage)
    chosen = run("train", *words, cwd=workplace)
    assert [name.split("/")[0] for name in chosen.built] == ["damaged", "tuned"]
    facts = [trained(outcome) for outcome in (random, chosen)]
    assert all(600 - 80 < one["target_tokens"] <= 600 for one in facts)
    assert all(len(one["ids"]) == one["trained"] for one in facts)
    assert facts[0]["validation"] == facts[1]["validation"] == 4
    (damaged,) = (workplace / "artifacts" / "damaged").iterdir()
    damages = {row["id"]: row["damage"] for row in read_jsonl(damaged / "rows.jsonl")}
    least = min(damages[id] for id in facts[1]["ids"])
    left = [id for id, damage in damages.items() if damage > least and id not in facts[1]["ids"]]
    assert len(left) <= 4 + 5, "those that are held out, and duplicates"
    assert sorted(facts[0]["ids"]) != sorted(facts[1]["ids"])
    weighed = run("train", *small, *QUICK, *DRAW, "finetune.weights=damage", "finetune.domains=damage", cwd=workplace)
    assert [name.split("/")[0] for name in weighed.built] == ["tuned"]
    capsys.readouterr()
    (cut,) = (workplace / "artifacts" / "pruned").glob("*/manifest.json")
    digest = json.loads(cut.read_text())
    source = ["--source", f"{digest['spec']['model']}={checkpoint}", "--artifacts", str(workplace / "artifacts")]
    (surprisals,) = (workplace / "artifacts" / "surprisals").iterdir()
    for address in (weighed.path.name, damaged.name, surprisals.name):
        assert stages(["rerun", address, *source]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == "identical\n" * 3


MISTAKES = {
    "both": (["finetune.num_tokens=9"], "finetune.num_rows=12 and finetune.num_tokens=9 both say how much"),
    "all": (["finetune.num_rows=null", "finetune.choose=damage"], "finetune.choose=damage chooses nothing"),
    "loss": (["finetune=logit_distill", "finetune.weights=damage"], "finetune.weights=damage weighs cross-entropy"),
    "word": (["finetune.domains=size"], "finetune.domains=size is unknown; choose damage"),
    "kind": (["finetune.choose=best"], "finetune.choose=best is unknown; choose one of random, damage"),
    "share": (["finetune.deduplicate=1.5"], "finetune.deduplicate=1.5 must be above 0 and at most 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str, composed: Callable[..., DictConfig]) -> None:
    words, message = MISTAKES[name]
    config = composed(*words)
    with open_dict(config):
        del config["hydra"]
    with pytest.raises(UserError, match=message):
        check_values(config)


LATER = {
    "no cut": (["pruning=none"], "finetune.choose=damage: nothing is cut"),
    "one domain": (["finetune.domains=damage", "dataset.families=[word]"], "the rows are of one domain"),
}


@pytest.mark.parametrize("name", LATER)
def test_what_has_no_damage_to_go_by_ends_in_one_line(name: str, small: list[str], tmp_path: Path) -> None:
    words, message = LATER[name]
    outcome = run("train", *small, *QUICK, "finetune.choose=damage", *words, cwd=tmp_path)
    assert (outcome.code, outcome.stdout) == (2, "")
    assert len(outcome.errors) == 1 and message in outcome.errors[0]
    assert not artifacts_of(tmp_path / "artifacts")
