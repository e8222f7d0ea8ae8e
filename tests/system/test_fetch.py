"""What `fetch=true` leaves on a machine is all that a study needs of the hub: the hub is then gone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hub_server import commit_of, settings
from launching import REPOSITORY, run

SCRIPT = """
import json, os, sys
from pathlib import Path
from hub_server import serving
root, work, words = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
with serving(root) as hub:
    os.environ["HF_ENDPOINT"] = hub.url
    from launching import run
    fetched = run("evaluate", *words, "fetch=true", cwd=work)
    asked = len(hub.asked)
left = sorted(str(path) for path in (work / "artifacts").glob("[a-z]*")) if (work / "artifacts").exists() else []
built = run("evaluate", *words, cwd=work)
print("RESULT" + json.dumps([fetched.code, fetched.stdout, asked, left, built.code, built.built, built.stderr]))
"""


def test_a_study_is_built_after_the_hub_is_gone(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "hub" / "somebody" / "small")
    sums = tmp_path / "hub" / "datasets" / "somebody" / "sums"
    sums.mkdir(parents=True)
    rows = [{"question": f"What is {n} and 1?", "answer": f"#### {n + 1}"} for n in range(40)]
    (sums / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model=local", "model.path=somebody/small", "model.dtype=float32", "pruning=n1", "metric=last"]
    words += ["dataset=gsm8k", "dataset.hub.repository=somebody/sums", "dataset.hub.stream=true", "dataset.num_rows=12"]
    words += [f"dataset.hub.revision={commit_of('somebody/sums')}", "dataset.hub.files=[rows.jsonl]"]
    words += ["finetune=sft", "finetune.num_rows=8", "finetune.validation_rows=2", "finetune.epochs=1"]
    words += ["evaluation.tasks=[word]", "evaluation.limit=1", "evaluation.max_new_tokens=4"]
    words += ["calibration.num_texts=2", "finetune.max_length=256"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "hub"), str(tmp_path / "work"), json.dumps(words)],
        env={
            **kept,
            **settings("http://unused", tmp_path / "home"),
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY}/tests:{REPOSITORY}/tests/system",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "RESULT" in done.stdout, done.stderr
    code, printed, asked, left, built_code, built, stderr = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    assert code == 0, done.stderr
    assert asked > 0 and not left
    assert "models--somebody--small" in printed
    assert built_code == 0, stderr
    assert {name.split("/")[0] for name in built} == {"scores", "pruned", "targets", "tuned", "evaluated"}


def test_a_dry_run_fetches_nothing(small: list[str], tmp_path: Path) -> None:
    (line,) = run("train", *small, "fetch=true", "dry_run=true", cwd=tmp_path).errors
    assert "exclude each other" in line
