"""A dry run of what lies on a hub: nothing is fetched, nothing heavy imported, and every artifact has an estimate."""

import json
import re
from pathlib import Path

from launching import REPOSITORY, run, subprocess_run
from test_scripts import HEAVY, RUN_AND_LIST

UNFETCHED = "model=smollm2_135m_instruct"


def test_unfetched_model_is_planned_without_the_hub_and_without_torch(tmp_path: Path) -> None:
    path = str(REPOSITORY / "evaluate.py")
    words = ["-c", RUN_AND_LIST, path, json.dumps(HEAVY), UNFETCHED, "dry_run=true"]
    outcome = subprocess_run(words, tmp_path, HF_HOME=str(tmp_path / "empty"), HF_ENDPOINT="http://127.0.0.1:9")
    assert outcome.code == 0, outcome.stderr
    *planned, imported = outcome.lines
    assert imported == "imported []"
    stages = [line.split()[3].split("/")[0] for line in planned]
    assert sorted(stages) == ["evaluated", "pruned", "rewrites", "scores", "targets", "tuned"]
    for line in planned:
        assert re.match(r"would be built +[a-z]+/\?[0-9a-f]{16} +~\d.* (s|min|h), .* memory, .* disk", line), line
    (cut,) = [line for line in planned if "pruned/" in line.split("<-")[0]]
    assert "0.25 GB disk" in cut  # 28 of 30 blocks of 3,540,096 weights, embeddings, two bytes each
    assert "about " in outcome.stderr and "within a factor of 3" in outcome.stderr
    assert not (tmp_path / "artifacts").exists()
    assert not (tmp_path / "empty").exists()


def test_bad_cut_of_an_unfetched_model_is_told(tmp_path: Path) -> None:
    outcome = run("prune", UNFETCHED, "pruning.size=30", "dry_run=true", cwd=tmp_path)
    assert outcome.errors == ["error: pruning.size=30 removes all 30 blocks; choose at most 29"]


def test_hub_model_without_sizes_says_how_to_get_it(tmp_path: Path) -> None:
    outcome = run("prune", "model=local", "model.path=nobody/nothing", "dry_run=true", cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.errors == [
        "error: model.path=nobody/nothing: not in the Hugging Face cache; fetch it with: hf download nobody/nothing"
    ]


def test_sweep_counts_what_jobs_share_once(tmp_path: Path) -> None:
    words = ["-m", UNFETCHED, "pruning=n1,n2", "finetune=none", "metric=last", "dry_run=true", "hydra.sweep.dir=sweep"]
    outcome = run("prune", *words, cwd=tmp_path)
    assert outcome.code == 0, outcome.stderr
    assert len(outcome.lines) == 4
    assert "the whole sweep: 3 artifacts to build" in outcome.stderr
