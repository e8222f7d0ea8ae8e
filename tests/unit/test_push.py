"""Pushing an exported folder: what reaches the hub, and one line for everything that stops it before or on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, serving, settings

PUSH = """
import json, sys
from pathlib import Path
from sdd.errors import UserError
from sdd.export.checkpoint import check_login, push
folder, cases = json.load(sys.stdin)
answers = []
for repo, public in cases:
    try:
        check_login(repo)
        answers.append(push(Path(folder), repo, public))
    except UserError as error:
        answers.append(f"error: {error}")
print(json.dumps(answers))
"""


def pushed(folder: Path, url: str, cache: Path, cases: list, token: str | None) -> list[str]:
    own = settings(url, cache) | {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"HF_TOKEN": token} if token else {})
    kept = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    done = subprocess.run(
        [sys.executable, "-c", PUSH],
        input=json.dumps([str(folder), cases]),
        env=kept | own,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "student"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: mit\n---\n# A student\n")
    (made / "model.safetensors").write_bytes(bytes(range(256)))
    return made


def test_the_whole_folder_reaches_a_private_repository(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as hub:
        answers = pushed(
            folder, hub.url, tmp_path / "home", [("somebody/student", False), ("somebody/open", True)], TOKEN
        )
        assert answers == [f"{hub.url}/somebody/student", f"{hub.url}/somebody/open"]
    assert hub.pushed["somebody/student"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    private = [one.get("private", one.get("visibility") == "private") for one in hub.made]  # two spellings by version
    assert private == [True, False]


def test_what_stops_a_push_is_told_before_anything_is_made(folder: Path, tmp_path: Path) -> None:
    case = [("somebody/student", False)]
    with serving(tmp_path) as hub:
        (nobody,) = pushed(folder, hub.url, tmp_path / "home", case, None)
        (stranger,) = pushed(folder, hub.url, tmp_path / "home", case, "hf_another")
        (unnamed,) = pushed(folder, hub.url, tmp_path / "home", [("student", False)], TOKEN)
        assert hub.made == []
    (gone,) = pushed(folder, hub.url, tmp_path / "home", case, TOKEN)
    assert nobody == ("error: --push somebody/student: nobody is logged in here; run: hf auth login, or set HF_TOKEN")
    assert "the hub refuses the token of this machine (401)" in stranger
    assert unnamed == "error: --push student: write OWNER/NAME"
    assert "the hub cannot be reached" in gone
    assert not any("\n" in answer for answer in (nobody, stranger, unnamed, gone))
