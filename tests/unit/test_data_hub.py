"""Dataset repositories on a hub: a small server on this machine that answers as the hub does, asked by the real client.

The cases run in a process of their own, one after another.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import commit_of, serving, settings

from sdd.data.hub import Repository
from sdd.data.instruct import GSM8K
from sdd.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
COMMIT = commit_of("somebody/sums")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, folder of datasets) of a hub with `somebody/sums` on it, and the same behind a gate."""
    root = tmp_path_factory.mktemp("hub")
    sums = root / "datasets" / "somebody" / "sums"
    rows = [{"question": f"q{n}?", "answer": f"#### {n}"} for n in range(60)]
    talk = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    (sums / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{"messages": talk}]), sums / "talk.parquet")
    (sums / "README.md").write_text("sums")
    (sums / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(2):
        table = pa.Table.from_pylist(rows[30 * number : 30 * number + 30])
        pq.write_table(table, sums / "data" / f"train-{number:05d}-of-00002.parquet")
    shutil.copytree(sums, root / "datasets" / "gated" / "sums")
    with serving(root) as server:
        yield server.url, root / "datasets" / "somebody"


SCRIPT = """
import json, sys
import datasets.config
from sdd.data.instruct import GSM8K
from sdd.data.local import LocalRows
from sdd.data.texts import CorpusTexts
from sdd.errors import UserError
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # of the 5 s that it idles after every stream
for line in sys.stdin:
    case = json.loads(line)
    try:
        if case.pop("texts", False):
            found = CorpusTexts(**case).texts()
        elif case.pop("own", False):
            found = [[e.id, [turn["content"] for turn in e.before], e.prompt] for e in LocalRows(**case).examples()]
        else:
            found = [[e.id, e.prompt] for e in GSM8K(**case).examples()]
    except UserError as error:
        found = f"error: {error}"
    print("RESULT" + json.dumps(found), flush=True)
"""


def node(
    name: str = "somebody/sums", files: tuple[str, ...] = ("data/train-*.parquet",), **other: Any
) -> dict[str, Any]:
    return {"repository": name, "revision": commit_of(name), "files": list(files), "stream": False, **other}


def asked(address: str, home: Path, *cases: dict[str, Any], **environment: str) -> list[Any]:
    """What a fresh process makes of the cases, with its hub at `address` and its caches in `home`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input="".join(json.dumps(case) + "\n" for case in cases),
        env={**kept, **settings(address, home), "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line.removeprefix("RESULT")) for line in done.stdout.splitlines() if line.startswith("RESULT")]


@pytest.fixture(scope="module")
def answers(hub: tuple[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the hub's client makes of every case, by name."""
    cases = {
        "parquet": {"hub": node()},
        "jsonl": {"hub": node(files=("rows.jsonl",))},
        "sample": {"hub": node(), "num_rows": 7, "seed": 3},
        "stream": {"hub": node(stream=True), "num_rows": 7, "seed": 3},
        "longer stream": {"hub": node(stream=True), "num_rows": 20, "seed": 3},
        "other stream": {"hub": node(stream=True), "num_rows": 7, "seed": 4},
        "stream too short": {"hub": node(stream=True), "num_rows": 61},
        "stream of nothing": {"hub": node(files=("data/test-*.parquet",), stream=True), "num_rows": 3},
        "stream of jsonl": {"hub": node(files=("rows.jsonl",), stream=True), "num_rows": 7, "seed": 3},
        "gated": {"hub": node("gated/sums")},
        "gated stream": {"hub": node("gated/sums", stream=True), "num_rows": 3},
        "login": {"hub": node("login/sums")},
        "nowhere": {"hub": node("somebody/nowhere")},
        "nowhere stream": {"hub": node("somebody/nowhere", stream=True), "num_rows": 3},
        "no commit": {"hub": node(revision=COMMIT[::-1])},
        "no file": {"hub": node(files=("data/test-*.parquet",))},
        "own names": {"own": True, "hub": node(), "fields": {"prompt": "question", "reference": "answer"}},
        "conversations": {"own": True, "hub": node(files=("talk.parquet",))},
        "no column": {"texts": True, "num_texts": 3, "hub": node()},
    }
    home = tmp_path_factory.mktemp("home")
    found = asked(hub[0], home, *cases.values())
    kept = {"hub": node(stream=True), "num_rows": 20, "seed": 3}
    offline = [{"hub": node()}, {"hub": node("somebody/elsewhere")}, kept, kept | {"num_rows": 21}]
    again = asked("http://127.0.0.1:9", home, *offline, HF_HUB_OFFLINE="1")
    down = asked("http://127.0.0.1:9", home, {"hub": node("somebody/elsewhere")})
    return (
        dict(zip(cases, found, strict=True))
        | {"offline": again[0], "offline, other": again[1], "down": down[0]}
        | {
            "kept stream": again[2],
            "more than is kept": again[3],
        }
    )


def test_files_are_fetched_and_read_as_local_ones(answers: dict[str, Any], hub: tuple[str, Path]) -> None:
    whole = [[str(n), f"q{n}?"] for n in range(60)]
    assert answers["parquet"] == answers["jsonl"] == whole
    assert answers["own names"] == [[id, [], prompt] for id, prompt in whole]
    assert answers["conversations"] == [["0", ["user 0", "assistant 0"], "user 1"]]
    local = GSM8K(str(hub[1] / "sums" / "rows.jsonl"), num_rows=7, seed=3).examples()
    assert answers["sample"] == [[e.id, e.prompt] for e in local]
    assert answers["offline"] == whole, "what is in the hub's cache needs no network"


def test_a_stream_gives_a_seeded_sample_with_nested_prefixes(answers: dict[str, Any]) -> None:
    stream = answers["stream"]
    assert len(stream) == len({id for id, _ in stream}) == 7
    assert answers["longer stream"][:7] == stream
    assert sorted(answers["other stream"]) != sorted(stream)
    assert {prompt for _, prompt in stream} != {f"q{n}?" for n in range(7)}
    assert {prompt for _, prompt in answers["stream of jsonl"]} <= {f"q{n}?" for n in range(60)}
    assert answers["kept stream"] == answers["longer stream"], "what was read needs no network"
    assert answers["stream too short"] == "error: dataset.num_rows=61, but somebody/sums has 60 rows"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gated", "dataset.hub.repository=gated/sums is gated: accept its licence at https://huggingface.co/datasets/"),
        ("gated stream", "dataset.hub.repository=gated/sums is gated: accept its licence"),
        ("login", "dataset.hub.repository=login/sums is gated: accept its licence"),
        ("nowhere", "dataset.hub.repository=somebody/nowhere: there is no such dataset, or it is private"),
        ("nowhere stream", "dataset.hub.repository=somebody/nowhere: there is no such dataset, or it is private"),
        ("no commit", f"dataset.hub.repository=somebody/sums has no commit {COMMIT[::-1]}"),
        ("no file", f"dataset.hub.repository=somebody/sums has no file data/test-*.parquet at {COMMIT}"),
        ("stream of nothing", f"somebody/sums has no file data/test-*.parquet at {COMMIT}"),
        ("no column", "no column 'text'; the file has question, answer"),
        ("offline, other", "the hub cannot be reached (HF_HUB_OFFLINE is set) and the files are not in its cache"),
        ("more than is kept", "the hub cannot be reached"),
        ("down", "the hub cannot be reached ("),
    ],
)
def test_what_the_hub_refuses_is_one_line(case: str, message: str, answers: dict[str, Any]) -> None:
    assert str(answers[case]).startswith("error: ")
    assert message in answers[case]
    assert "\n" not in answers[case]


def test_a_moving_revision_is_refused() -> None:
    for revision in (None, "main", COMMIT[:7]):
        with pytest.raises(UserError, match=rf"dataset\.hub\.revision={revision} is no commit; pin"):
            Repository.of(node(revision=revision), "dataset")
    with pytest.raises(UserError, match="names no file"):
        Repository.of(node(files=()), "dataset")
    with pytest.raises(UserError, match=r"dataset\.num_rows is not set; somebody/sums is large"):
        GSM8K(hub=node(stream=True))


def test_the_key_is_known_without_the_hub() -> None:
    with contextlib.chdir("/"):
        spec = GSM8K(hub=node(), num_rows=5, seed=1).spec()
    assert spec["hub"] == node()
    assert GSM8K(hub=node(), num_rows=5, seed=1).spec() == spec
    others = (node(revision=COMMIT[::-1]), node(stream=True), node(files=("rows.jsonl",)))
    assert len({GSM8K(hub=other, num_rows=5, seed=1).spec()["digest"] for other in (node(), *others)}) == 4
    assert GSM8K(hub=node(), num_rows=5).known_rows() == 5
    assert GSM8K(hub=node()).known_rows() is None
