"""What `fetch=true` leaves on a machine is all that a study needs of the hub: then no network is touched any more."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import commit_of, serving, settings
from launching import REPOSITORY, run

SCRIPT = """
import json, sys
how, work, words = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
touched = []
def refuse(event, arguments):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(arguments[1], tuple):
        touched.append(str(arguments[:2]))
        raise OSError(101, "Network is unreachable")
if how != "fetch=true":
    sys.addaudithook(refuse)
import datasets.config
from pathlib import Path
from launching import run
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # of the 5 s that it idles after every stream
outcome = run("evaluate", *words, how, cwd=Path(work))
print("RESULT" + json.dumps([outcome.code, outcome.stdout, outcome.built, touched, outcome.stderr]))
"""


def evaluate(how: str, words: list[str], folder: Path, **environment: str) -> list[Any]:
    """Exit code, stdout, what was built, where the network was touched, and stderr, of a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    paths = f"{REPOSITORY}:{REPOSITORY}/tests:{REPOSITORY}/tests/system"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, str(folder / "work"), json.dumps(words)],
        env={**kept, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "RESULT" in done.stdout, done.stderr
    answer: list[Any] = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    return answer


def write_questions(folder: Path, configuration: str, text: str) -> None:
    """A configuration of multiple choice as lm-eval's ARC reads it, in the files and by the page that the hub has."""
    (folder / configuration).mkdir(parents=True)
    page = f"---\nconfigs:\n- config_name: {configuration}\n  data_files:\n"
    for split in ("train", "validation", "test"):
        rows = [
            {"id": str(n), "question": text, "choices": {"text": ["a stone", "the bird"], "label": ["A", "B"]}}
            | {"answerKey": "B"}
            for n in range(3)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / configuration / f"{split}-00000-of-00001.parquet")
        page += f"  - split: {split}\n    path: {configuration}/{split}-*\n"
    (folder / "README.md").write_text(f"{page}---\n")


@pytest.fixture(scope="module")
def hub(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, running texts and the rows of a benchmark, as a hub has them."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_llama, root / "somebody" / "small")
    files = {
        "somebody/sums": [{"question": f"What is {n} and 1?", "answer": f"#### {n + 1}"} for n in range(40)],
        "somebody/texts": [{"text": f"The bird number {n} can fly."} for n in range(3)],
    }
    for name, rows in files.items():
        path = root / "datasets" / name / "rows.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_questions(root / "datasets" / "allenai" / "ai2_arc", "ARC-Easy", "What can fly?")
    return root


def test_a_study_is_built_after_the_hub_is_gone(hub: Path, tmp_path: Path) -> None:
    """Texts are fetched whole or, by another job, read of a stream that ends before the rows that it was asked for."""
    words = ["model=local", "model.path=somebody/small", "model.dtype=float32", "pruning=n1", "metric=angular"]
    words += ["dataset=gsm8k", "dataset.hub.repository=somebody/sums", "dataset.hub.stream=true", "dataset.num_rows=12"]
    words += [f"dataset.hub.revision={commit_of('somebody/sums')}", "dataset.hub.files=[rows.jsonl]"]
    words += ["calibration=c4", "calibration.hub.repository=somebody/texts", "calibration.hub.files=[rows.jsonl]"]
    words += [f"calibration.hub.revision={commit_of('somebody/texts')}", "calibration.num_texts=3"]
    words += ["finetune=sft", "finetune.num_rows=8", "finetune.validation_rows=2", "finetune.epochs=1"]
    words += ["evaluation=lm_eval", "evaluation.tasks=[arc_easy]", "evaluation.limit=1", "finetune.max_length=256"]
    with serving(hub) as server:
        reached = settings(server.url, tmp_path / "home")
        both = ["-m", "calibration.hub.stream=false,true", *words]
        code, printed, built, _, stderr = evaluate("fetch=true", both, tmp_path, **reached)
        assert code == 0, stderr
        asked = " ".join(server.asked)
    assert all(name in asked for name in ("somebody/small", "somebody/sums", "somebody/texts", "allenai/ai2_arc"))
    assert "models--somebody--small" in printed
    assert not built
    assert not (tmp_path / "work" / "artifacts").exists() or not list((tmp_path / "work" / "artifacts").glob("[a-z]*"))
    code, _, built, touched, stderr = evaluate("dry_run=false", both, tmp_path, **reached | {"HF_HUB_OFFLINE": "1"})
    assert code == 0, stderr
    counts = Counter(name.split("/")[0] for name in built)
    assert counts == {"scores": 2, "pruned": 2, "targets": 1, "tuned": 2, "evaluated": 2}
    assert not touched


def test_a_dry_run_fetches_nothing(small: list[str], tmp_path: Path) -> None:
    (line,) = run("train", *small, "fetch=true", "dry_run=true", cwd=tmp_path).errors
    assert "exclude each other" in line
