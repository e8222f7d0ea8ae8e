"""Checkpoints from a hub, over real HTTP: what is fetched, what is not, and one clear line for everything that fails.

A process of its own asks a small hub on this machine for one repository after another, since where the hub is and
where its cache lies is read when the library is imported.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub, commit_of, serving, settings

from sdd.errors import NotFetched, UserError
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint
from sdd.models.hub import checkpoint_folder, is_hub_id

ASK = """
import json, sys
from sdd.errors import UserError
from sdd.models.hub import checkpoint_folder
answers = {}
for name, repo, revision, fetch in json.load(sys.stdin):
    try:
        answers[name] = str(checkpoint_folder(repo, revision, fetch))
    except UserError as error:
        answers[name] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""
CASES = [
    ("whole", "good/whole", None, True),
    ("whole again", "good/whole", None, True),
    ("whole, a dry run", "good/whole", None, False),
    ("sharded", "good/sharded", "main", True),
    ("pinned", "good/sharded", commit_of("good/sharded"), True),
    ("not here, a dry run", "good/other", None, False),
    ("gated", "gated/model", None, True),
    ("missing", "nobody/nothing", None, True),
    ("no such revision", "good/whole", "v2", True),
    ("server in trouble", "down/model", None, True),
    ("pickled", "bad/pickled", None, True),
    ("remote code", "bad/code", None, True),
    ("no such shard", "bad/shard", None, True),
    ("no index", "bad/no-index", None, True),
    ("no tokenizer", "bad/tokenizer", None, True),
    ("no config", "bad/empty", None, True),
]


def ask(cases: list[Any], cache: Path, url: str, **environment: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps(cases),
        env={**os.environ, **settings(url, cache), "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def repositories(tiny_llama: Path, sharded_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as they lie on a hub: whole ones, with what nobody needs beside, and broken ones."""
    root = tmp_path_factory.mktemp("hub")
    for repo in ("good/whole", "good/other", "gated/model", "bad/pickled", "bad/code", "bad/tokenizer"):
        shutil.copytree(tiny_llama, root / repo)
    for repo in ("good/sharded", "bad/shard", "bad/no-index"):
        shutil.copytree(sharded_llama, root / repo)
    page = "---\nlicense: apache-2.0\n---\n# A model\n"
    (root / "good/whole/README.md").write_text(page)
    for name in ("pytorch_model.bin", "modeling.py", "consolidated.safetensors", "original/params.json"):
        (root / "good/whole" / name).parent.mkdir(exist_ok=True)
        (root / "good/whole" / name).write_bytes(b"nobody reads this")
    (root / "bad/pickled/model.safetensors").rename(root / "bad/pickled/pytorch_model.bin")
    config = json.loads((root / "bad/code/config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "code.Model"}, "model_type": "other"}
    (root / "bad/code/config.json").write_text(json.dumps(config))
    sorted((root / "bad/shard").glob("model-*.safetensors"))[1].unlink()
    (root / "bad/no-index/model.safetensors.index.json").unlink()
    (root / "bad/tokenizer/tokenizer.json").unlink()
    (root / "bad/empty").mkdir()
    (root / "bad/empty/model.safetensors").write_bytes(b"")
    return root


@pytest.fixture(scope="module")
def asked(repositories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Hub, Path]:
    cache = tmp_path_factory.mktemp("cache")
    with serving(repositories) as hub:
        return ask(CASES, cache, hub.url), hub, cache


def downloads(hub: Hub, repo: str) -> list[str]:
    opening = f"GET /{repo}/resolve/{commit_of(repo)}/"
    return [line.removeprefix(opening) for line in hub.asked if line.startswith(opening)]


def test_only_what_stock_loading_reads_is_fetched_and_only_once(asked: Any, repositories: Path) -> None:
    answers, hub, _ = asked
    wanted = {path.name for path in (repositories / "good/other").iterdir()} | {"README.md"}
    assert sorted(downloads(hub, "good/whole")) == sorted(wanted)
    assert answers["whole"] == answers["whole again"] == answers["whole, a dry run"]
    folder = Path(answers["whole"])
    assert {path.name for path in folder.iterdir()} == wanted
    assert folder.name == commit_of("good/whole")


def test_a_fetched_checkpoint_is_the_same_work_as_its_folder(asked: Any, repositories: Path, tmp_path: Path) -> None:
    answers, hub, _ = asked
    for name, repo in (("whole", "good/whole"), ("sharded", "good/sharded")):
        fetched = Checkpoint(Path(answers[name])).digest(tmp_path)
        assert fetched == Checkpoint(repositories / repo).digest(tmp_path)
    assert answers["pinned"] == answers["sharded"]
    model = Checkpoint(Path(answers["sharded"])).model("float32")
    assert len(checkpoints.blocks(model)) == 4
    assert len(downloads(hub, "good/sharded")) == len(list((repositories / "good/sharded").iterdir()))


MISTAKES = {
    "not here, a dry run": "NotFetched: model.path=good/other: not in the Hugging Face cache; fetch it with: hf ",
    "gated": "model.path=gated/model is gated: accept its licence at https://huggingface.co/gated/model, then log in "
    "here with: hf auth login",
    "missing": "model.path=nobody/nothing: no such folder here, and no such repository on the hub",
    "no such revision": "model.path=good/whole: the hub has no revision v2 of it; see model.revision",
    "server in trouble": "model.path=down/model: the hub",
    "pickled": "model.path=bad/pickled: the weights are pickled (pytorch_model.bin), which can run code",
    "remote code": "model.path=bad/code: needs remote code",
    "no such shard": "model.path=bad/shard: the index names model-00002-of-",
    "no index": "model.path=bad/no-index: no safetensors weights",
    "no tokenizer": "model.path=bad/tokenizer: no tokenizer",
    "no config": "model.path=bad/empty: no config.json",
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_used_is_told_in_one_line(case: str, asked: Any) -> None:
    message = asked[0][case]
    assert message.startswith(("UserError: ", "NotFetched: "))
    assert MISTAKES[case] in message
    assert "\n" not in message


def test_weights_of_what_is_refused_are_never_fetched(asked: Any) -> None:
    _, hub, _ = asked
    assert "model.safetensors" not in downloads(hub, "bad/code")
    assert downloads(hub, "bad/empty") == []
    assert [line for line in hub.asked if line.endswith((".bin", ".py"))] == []


def test_without_a_network_the_cache_is_enough(asked: Any) -> None:
    """The hub that filled the cache is gone by now."""
    answers, hub, cache = asked
    cases = [("whole", "good/whole", None, True), ("other", "good/other", None, True)]
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        found = ask(cases, cache, hub.url, **environment)
        assert found["whole"] == answers["whole"]
        assert "model.path=good/other: the hub cannot be reached" in found["other"]
    assert "(HF_HUB_OFFLINE is set)" in found["other"]
    assert "there is no such folder here" in found["other"], "what was meant may have been a folder"


def test_a_name_that_the_hub_lacks_is_told_from_a_hub_that_is_not_there(asked: Any) -> None:
    answers, hub, cache = asked
    absent = ask([("missing", "nobody/nothing", None, True)], cache, hub.url)["missing"]
    assert "no such repository on the hub" in answers["missing"]
    assert "the hub cannot be reached" not in answers["missing"]
    assert "the hub cannot be reached" in absent
    assert "no such repository" not in absent


def test_a_fetch_that_was_cut_short_is_continued(asked: Any, repositories: Path, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(asked[2], tmp_path / "cache", symlinks=True))
    (snapshot,) = cache.rglob(commit_of("good/sharded"))
    shards = sorted(snapshot.glob("model-*"))
    shards[1].resolve().unlink()
    shards[1].unlink()
    with serving(repositories) as hub:
        found = ask([("sharded", "good/sharded", "main", True)], cache, hub.url)
    assert downloads(hub, "good/sharded") == [shards[1].name]
    assert Path(found["sharded"]) == snapshot
    assert len(Checkpoint(snapshot).weight_files) == len(shards)


@pytest.mark.parametrize(
    ("path", "is_id"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", True),
        ("nowhere", False),
        ("./a/b", False),
        ("/a/b", False),
        ("~/models", False),
        ("a/b/c", False),
        ("../a", False),
        ("here/there", False),
    ],
)
def test_a_hub_id_is_what_is_no_folder(
    path: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_random: Callable
) -> None:
    (tmp_path / "here/there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_id(path) == is_id
    if not is_id:
        assert checkpoint_folder(path, None) == Path(path).expanduser()


def test_not_fetched_is_a_users_mistake_too() -> None:
    assert issubclass(NotFetched, UserError)
