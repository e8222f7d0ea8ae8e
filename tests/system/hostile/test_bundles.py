"""Bundles of strangers: each is refused in one line, having written nothing and run nothing."""

import io
import json
import os
import stat
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from canaries import Canaries

from sdd.config.shared import SERVERS
from sdd.share import rerun
from sdd.store import STAGES
from sdd.store.recipe import address_of

SPEC = {"num_blocks": 12, "metric": {"_target_": "sdd.importance.Last", "keep_final": False}}
ADDRESS = address_of("scores", 1, SPEC, {})
MANIFEST: dict[str, Any] = {"stage": "scores", "address": ADDRESS, "version": 1, "spec": SPEC, "inputs": {}}
MANIFEST |= {"labels": {}, "files": {}, "seconds": 1.0, "created": "now"}
PLACE = f"artifacts/scores/{ADDRESS}/manifest.json"


def job(*overrides: str, **other: Any) -> dict[str, Any]:
    return {"script": "prune", "overrides": list(overrides), "stage": "scores", "address": ADDRESS, **other}


def facts(*jobs: Any, **other: Any) -> str:
    stages = {name: stage.version for name, stage in STAGES.items()}
    return json.dumps({"format": 1, "jobs": list(jobs), "stages": stages, "versions": {}, **other})


def bundle(members: dict[str, str | bytes]) -> bytes:
    """A whole bundle but for what is said of its members."""
    file = io.BytesIO()
    whole: dict[str, str | bytes] = {"study.json": facts(job("metric=last"))}
    whole |= {"jobs/0/config.yaml": "seed: 0\n", PLACE: json.dumps(MANIFEST)}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (whole | members).items():
            archive.writestr(name, content)
    return file.getvalue()


def with_entry(change: Callable[[zipfile.ZipInfo], Any], content: str = "x") -> bytes:
    file = io.BytesIO(bundle({}))
    with zipfile.ZipFile(file, "a") as archive:
        entry = zipfile.ZipInfo("report/extra")
        change(entry)
        archive.writestr(entry, content)
    return file.getvalue()


def as_link(entry: zipfile.ZipInfo) -> None:
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16


def lying(size: int) -> bytes:
    """The list of members says another size than study.json unpacks to."""
    content = bytearray(bundle({"study.json": " " * (8 << 20)}))
    start = content.index(b"PK\x01\x02")
    struct.pack_into("<I", content, start + 24, size)
    return bytes(content)


def long_list() -> bytes:
    """A list of members that is said to take a gigabyte, in a file that has one."""
    content = bytearray(bundle({}))
    end = content.rindex(b"PK\x05\x06")
    struct.pack_into("<II", content, end + 12, 1 << 30, 0)
    return bytes(content[:end]) + bytes(1 << 20) + bytes(content[end:])


WORDS = {
    "a place": "paths.artifacts=OUTSIDE.d",
    "a tracker": "logger=wandb",
    "hydra": "hydra.run.dir=OUTSIDE.d",
    "a search path": "hydra.searchpath=[OUTSIDE.d]",
    "an allowance": "allow=antigravity.x",
    "an allowance, added": "++allow=antigravity.x",
    "the environment": "dataset.system_prompt=${oc.env:SDD_SECRET}",
    "a file above": "experiment=../../outside",
    "a file anywhere": "experiment=/etc/passwd",
    "a class": "metric._target_=os.mkdir",
    "control characters": "dataset.name=a\x1b[2J",
    "no override": "-m",
    "two words": "seed=1 metric=last",
    "a sweep": "seed=1,2",
    "an unknown setting": "sed=1",
    "a cut place": "model.path=.../mine",
    "without an end": "dataset.name=" + "a" * 30_000,
}
BUNDLES: dict[str, bytes | Callable[[], bytes]] = {
    "no zip": b"PK" + b"x" * 100,
    "empty": b"",
    "cut short": lambda: bundle({})[:-30],
    "a name above": lambda: bundle({"../evil": "x"}),
    "a name far above": lambda: bundle({"given/../../evil.yaml": "x"}),
    "an absolute name": lambda: bundle({"/tmp/evil": "x"}),
    "a name of a drive": lambda: bundle({"C:evil": "x"}),
    "a name of another system": lambda: bundle({"..\\evil": "x"}),
    "a folder": lambda: bundle({"given/": ""}),
    "a name that steers": lambda: bundle({"a\x1b[2J": "x"}),
    "a long name": lambda: bundle({"a" * 400: "x"}),
    "a name twice": lambda: bundle({"Study.json": "x"}),
    "a link": lambda: with_entry(as_link, "/etc/passwd"),
    "a pipe": lambda: with_entry(lambda entry: setattr(entry, "external_attr", (stat.S_IFIFO | 0o666) << 16)),
    "another compression": lambda: with_entry(lambda entry: setattr(entry, "compress_type", zipfile.ZIP_BZIP2)),
    "a bomb": lambda: bundle({"study.json": " " * (8 << 20)}),
    "a bomb that lies": lambda: lying(100),
    "bombs together": lambda: bundle({f"given/metric/{n}.yaml": " " * (1 << 20) for n in range(70)}),
    "files without an end": lambda: bundle({str(n): "" for n in range(20_001)}),
    "a list without an end": long_list,
    "a file that is a folder too": lambda: bundle({"given/a.yaml": "x: 1", "given/a.yaml/b.yaml": "x: 1"}),
    "no study": lambda: bundle({"study.json": "[]"}),
    "deep": lambda: bundle({"study.json": "[" * 100_000}),
    "not a number": lambda: bundle({"study.json": facts(job(), versions={"torch": 1})}),
    "no jobs": lambda: bundle({"study.json": facts()}),
    "another format": lambda: bundle({"study.json": facts(job(), format=2)}),
    "jobs without an end": lambda: bundle({"study.json": facts(*[job()] * 2_000)}),
    "no script": lambda: bundle({"study.json": facts(job(script="os.system"))}),
    "no such artifact": lambda: bundle({"study.json": facts(job(address="0" * 16))}),
    "an edited manifest": lambda: bundle({PLACE: json.dumps(MANIFEST | {"spec": {"num_blocks": 1}})}),
    "a manifest of a file outside": lambda: bundle({PLACE: json.dumps(MANIFEST | {"files": {"../x": "0"}})}),
    "a config that is none": lambda: bundle({"jobs/0/config.yaml": "[1"}),
    "a config with an object": lambda: bundle({"jobs/0/config.yaml": "a: !!python/object/apply:os.mkdir [RAN]"}),
    "a config that grows": lambda: bundle(
        {"jobs/0/config.yaml": "a: &a [1]\n" + "".join(f"b{n}: &b{n} [{'*a,' * 900}]\n" for n in range(60))}
    ),
    "a student's allowance": lambda: bundle(
        {"study.json": facts(job("merge=slerp", "merge.students=[['allow=antigravity.x'],['seed=1']]"))}
    ),
    "a config file that is refused": lambda: bundle(
        {
            "study.json": facts(job("experiment=evil")),
            "given/experiment/evil.yaml": "# @package _global_\nmetric: {_target_: os.mkdir, path: RAN}",
        }
    ),
    "a config file that allows": lambda: bundle(
        {
            "study.json": facts(job("experiment=evil")),
            "given/experiment/evil.yaml": "# @package _global_\nallow: antigravity.x",
        }
    ),
    **{
        f"an override of {name}": lambda word=word: bundle({"study.json": facts(job("metric=last", word))})
        for name, word in WORDS.items()
    },
}


@pytest.mark.parametrize("name", BUNDLES)
def test_bundle_is_refused(
    name: str, canaries: Canaries, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = BUNDLES[name]
    content = content() if callable(content) else content
    path = canaries.work.parent / "evil.zip"
    path.write_bytes(content)
    monkeypatch.chdir(canaries.work)
    before = set(canaries.work.parent.rglob("*"))
    assert rerun([str(path), "--yes"]) == 2
    outcome = capsys.readouterr()
    assert outcome.out == "" and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert len(outcome.err) < 3_000 and all(c.isprintable() or c == "\n" for c in outcome.err), ascii(outcome.err)
    assert "antigravity" not in sys.modules
    canaries.check(outcome.err)
    assert set(canaries.work.parent.rglob("*")) == before


@pytest.mark.parametrize("setting", SERVERS)
def test_bundle_names_no_server(setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    word = f"{setting}=http://127.0.0.1:9/v1"
    (tmp_path / "evil.zip").write_bytes(bundle({"study.json": facts(job("metric=last", word))}))
    assert rerun([str(tmp_path / "evil.zip"), "--yes"]) == 2
    told = capsys.readouterr().err
    assert told == f"error: study.json: job 0: {word} is not a config file's to set; say it on the command line\n"


def test_pipe_in_place_of_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "evil.zip")
    assert rerun([str(tmp_path / "evil.zip")]) == 2
    assert "not a regular file" in capsys.readouterr().err
