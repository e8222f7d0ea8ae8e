"""Reports made of a stranger's artifacts: refused in one line, or text that stays text in every file of the report."""

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from canaries import SECRET, Canaries
from launching import Outcome

from sdd.cli.sweep import _record, _tracker
from sdd.export.model_card import base_page, front_matter, lineage, model_card
from sdd.report.__main__ import main
from sdd.stages.runtime import Runtime
from sdd.store import Store

TEACHER, STUDENT, PRUNED = "a" * 16, "b" * 16, "c" * 16
DEEP = "[" * 20_000
Change = Callable[[Path], object]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


def change(path: Path, *keys: str, to: Any) -> None:
    """Set what lies under keys in a JSON file."""
    whole = node = json.loads(path.read_text())
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = to
    write(path, whole)


def put(root: Path, stage: str, address: str, inputs: dict[str, str], spec: dict[str, Any], **labels: str) -> Path:
    folder = root / stage / address
    facts = {"stage": stage, "address": address, "version": 1, "spec": spec, "inputs": inputs, "labels": labels}
    write(folder / "manifest.json", facts | {"files": {}, "seconds": 1.0, "created": "2026", "commit": "c"})
    return folder


def evaluated(root: Path, address: str, inputs: dict[str, str], task: str, spec: dict[str, Any]) -> Path:
    folder = put(root, "evaluated", address, inputs, {"suite": "tiny", "tasks": ["one"], **spec})
    result = {"metric": "exact_match", "value": 0.5, "stderr": 0.1, "n": 4, "lenient": 0.5, "malformed": 0.0}
    write(folder / "results.json", {"tasks": {task: result}})
    rows = [{"id": f"i{n}", "prompt": "p", "answer": "a", "response": "r", "score": float(n % 2)} for n in range(4)]
    if re.fullmatch(r"[\w ]{1,200}", task):
        write(folder / "samples" / f"{task}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def study(root: Path, task: str = "add", metric: str = "angular", **labels: str) -> Path:
    """An unpruned and a pruned model, evaluated."""
    evaluated(root, TEACHER, {}, task, {"model": "m" * 20})
    pruned = put(root, "pruned", PRUNED, {}, {"model": "m" * 20, "blocks": [1]}, **labels)
    cut = {"metric": metric, "removed_blocks": [1], "kept_blocks": [0, 2], "flops_saved": 0.3}
    write(pruned / "pruning.json", cut | {"parameters_before": 12, "parameters_after": 8})
    evaluated(root, STUDENT, {"model": PRUNED}, task, {})
    return root


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> None:
    """Asked for where plots and the page are made too."""


@pytest.fixture
def paged(request: pytest.FixtureRequest) -> None:
    """Asked for where the page is made, and no plots."""


@pytest.fixture(autouse=True)
def tables_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "whole" not in request.fixturenames:
        monkeypatch.setattr("sdd.report.plots.write_plots", lambda study, out: None)
    if not {"whole", "paged"} & set(request.fixturenames):
        monkeypatch.setattr("sdd.report.page.write_page", lambda *parts: None)


def reported(canaries: Canaries, capsys: pytest.CaptureFixture[str], *words: str) -> Outcome:
    root = canaries.work / "artifacts"
    code = main([str(root), "--out", str(canaries.work / "out"), *words])
    outcome = Outcome(code, *capsys.readouterr())
    assert "--debug" not in outcome.stderr, "refused by chance, not by a check"
    return outcome


# ---- names of tasks -------------------------------------------------------------------------------------------------

NAMES = [
    *("../../../outside", "../samples/add", "..", ".", "/OUTSIDE", "a/b", "a\\b", "C:add", "", " ", ".hidden", "-x"),
    *("add\n\\input{x}", "add\rx", "\x1b[2J", "\u202eevil", "add\u2028x", "\ud800", "a\0b", "=cmd()", "add|x", "<b>"),
    *("$x$", "%x", "x" * 300, "a..b", "~root", "`x`", "[x](y)", "a\tb", "a^^Mb", "{x}", "a&b", "#x", '"x"'),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_are_none_of_a_task(name: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    write(canaries.work.parent / "outside.jsonl", {"id": "x", "score": 1.0, "response": SECRET})
    study(canaries.work / "artifacts", canaries.fill(name))
    canaries.check_refused(reported(canaries, capsys))
    assert not (canaries.work / "out").exists()


# ---- files and values of other kinds --------------------------------------------------------------------------------

NUMBERS = ["NaN", "Infinity", "-Infinity", '"0.5"', "[]", "{}", "true", "1e999", "9" * 5000, "1" + "0" * 30]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: n[:12])
@pytest.mark.parametrize("where", ["value", "likelihood", "score", "parameters"])
def test_numbers_that_are_none(where: str, number: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    root = study(canaries.work / "artifacts")
    folder = root / "evaluated" / STUDENT
    path, before, after = {
        "value": (folder / "results.json", '"value": 0.5', f'"value": {number}'),
        "likelihood": (
            folder / "results.json",
            '{"tasks"',
            f'{{"likelihood": {{"nll": {{"value": {number}}}}}, "tasks"',
        ),
        "score": (folder / "samples" / "add.jsonl", '"score": 1.0', f'"score": {number}'),
        "parameters": (root / "pruned" / PRUNED / "pruning.json", '"flops_saved": 0.3', f'"flops_saved": {number}'),
    }[where]
    path.write_text(path.read_text().replace(before, after))
    if (where, number) == ("score", "true"):
        assert reported(canaries, capsys).code == 0
    else:
        canaries.check_refused(reported(canaries, capsys))


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.unlink()
    outside = path
    while outside.name != "work":
        outside = outside.parent
    path.symlink_to(outside.parent / "outside.txt")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _huge(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)


KINDS: dict[str, Change] = {
    "pipe": _pipe,
    "link out": _link,
    "folder": _folder,
    "terabyte": _huge,
    "gone": lambda path: path.unlink(),
    "deep": lambda path: write(path, DEEP),
    "latin": lambda path: path.write_bytes(b'{"tasks": "\xe4"}'),
    "list": lambda path: write(path, [1]),
    "empty object": lambda path: write(path, {}),
    "text": lambda path: write(path, '"text"'),
    "zeros": lambda path: path.write_bytes(b"\0" * 100),
}
FILES = [f"evaluated/{STUDENT}/results.json", f"evaluated/{STUDENT}/samples/add.jsonl", f"pruned/{PRUNED}/pruning.json"]
FILES += [f"evaluated/{STUDENT}/manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_kinds(name: str, kind: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    root = study(canaries.work / "artifacts")
    KINDS[kind](root / name)
    outcome = reported(canaries, capsys)
    if kind == "terabyte":
        os.truncate(root / name, 0)
    if (kind, Path(name).name) in (("gone", "manifest.json"), ("empty object", "pruning.json")):
        assert outcome.code == 0, outcome.stderr
        canaries.check(outcome.stderr)
    else:
        canaries.check_refused(outcome)


MANIFESTS: dict[str, tuple[str, Any]] = {
    "stage above": ("stage", "../evaluated"),
    "stage a list": ("stage", ["evaluated"]),
    "another address": ("address", PRUNED),
    "address a number": ("address", 5),
    "input above": ("inputs", {"model": "../../../x"}),
    "input absolute": ("inputs", {"model": "/etc"}),
    "input a list": ("inputs", {"model": [PRUNED]}),
    "inputs a list": ("inputs", [PRUNED]),
    "spec a text": ("spec", "text"),
    "spec too deep": ("spec", json.loads('{"a":' * 200 + "1" + "}" * 200)),
    "label a list": ("labels", {"dataset": [1]}),
    "command a number": ("command", 3),
    "seconds a text": ("seconds", "long"),
    "config a text": ("config", "x"),
    "version a text": ("version", "1"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(case: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    root = study(canaries.work / "artifacts")
    key, value = MANIFESTS[case]
    change(root / "evaluated" / STUDENT / "manifest.json", key, to=value)
    canaries.check_refused(reported(canaries, capsys))


def test_links_are_no_artifacts(canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = study(canaries.work.parent / "elsewhere")
    root = canaries.work / "artifacts"
    (root / "evaluated").mkdir(parents=True)
    (root / "evaluated" / STUDENT).symlink_to(theirs / "evaluated" / STUDENT)
    (root / "pruned").symlink_to(theirs / "pruned")
    canaries.check_refused(reported(canaries, capsys))


SWEEPS: dict[str, Any] = {
    "path a list": {"stage": "evaluated", "path": ["x"]},
    "path outside": {"stage": "evaluated", "path": "/etc"},
    "path with a zero": {"stage": "evaluated", "path": "a\0b/evaluated/x"},
    "path of another stage": {"stage": "evaluated", "path": f"artifacts/pruned/{PRUNED}"},
    "stage a list": {"stage": ["evaluated"], "path": "x"},
    "deep": DEEP,
}


@pytest.mark.parametrize("case", SWEEPS)
def test_folders_of_sweeps(case: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    study(canaries.work / "artifacts")
    write(canaries.work / "sweep" / "0" / "result.json", SWEEPS[case])
    code = main([str(canaries.work / "sweep"), "--out", str(canaries.work / "out")])
    canaries.check_refused(Outcome(code, *capsys.readouterr()))


def test_a_report_that_cannot_be_written(canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    study(canaries.work / "artifacts")
    (canaries.work / "out").write_text("x")
    outcome = reported(canaries, capsys)
    canaries.check_refused(outcome)
    assert "File exists" in outcome.stderr


ANALYSES: dict[str, dict[str, Any]] = {
    "drafted": {"drafted.json": {}, "prompts.jsonl": {"id": 1, "tokens": 1, "matched": 1, "lengths": {"4": []}}},
    "shifted": {"shift.json": {"similarity": {"histogram": {"edges": [1], "counts": ["a"]}}, "targets": []}},
    "measured": {"costs.json": {"teacher": {"parameters": "x"}, "student": {}, "saved": []}, "timings.json": [1]},
}


@pytest.mark.parametrize("stage", ANALYSES)
def test_analyses_of_another_form(
    stage: str, paged: None, canaries: Canaries, capsys: pytest.CaptureFixture[str]
) -> None:
    """These are nested too deeply to be checked one by one: what fails is one line all the same."""
    root = study(canaries.work / "artifacts")
    folder = put(root, stage, "9" * 16, {"model": PRUNED, "answers": "8" * 16}, {"context": 1})
    for name, value in ANALYSES[stage].items():
        write(folder / name, value)
    code = main([str(root), "--out", str(canaries.work / "out")])
    canaries.check_refused(Outcome(code, *capsys.readouterr()))


@pytest.mark.parametrize("seed", [[1], "1", 1.5, True, {"a": 1}, 10**30], ids=str)
def test_seeds_that_are_none(seed: Any, canaries: Canaries, capsys: pytest.CaptureFixture[str]) -> None:
    root = study(canaries.work / "artifacts")
    put(root, "tuned", "3" * 16, {"pruned": PRUNED}, {"seed": seed})
    evaluated(root, "4" * 16, {"model": "3" * 16}, "add", {})
    canaries.check_refused(reported(canaries, capsys))


# ---- text stays text ------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>window.broken=1</script><img src=x onerror=alert(1)>",
    "</script><svg onload=alert(1)>",
    "x | y\n\n# heading\n<b>bold</b>",
    "[click](javascript:alert(1)) ![x](https://evil/x.png) https://evil www.evil.com",
    '=HYPERLINK("https://evil")',
    "+1+cmd|' /C calc'!A0",
    "@SUM(1)",
    "\t=1+1",
    "-2+3",
    "\uff1d1+1",
    "x\n\\input{/etc/passwd}\n%",
    "\\write18{rm} $\\frac$ ^^M _ # & % ~ { }",
    "$\\frac{$ $x",
    "_hidden $",
    "\ud800 lone",
    "\u202eexe.txt\u2066",
    "\x1b]0;title\x07 \x9b31m \u2028",
    "`code` ```\n```html",
    "\U000e0041hidden",
    "x" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text)[:30])
@pytest.mark.parametrize("where", ["metric", "dataset"])
def test_names_stay_text_in_tables(
    text: str, where: str, canaries: Canaries, capsys: pytest.CaptureFixture[str]
) -> None:
    root = study(canaries.work / "artifacts", metric=text if where == "metric" else "angular")
    other = evaluated(root, "d" * 16, {"model": "e" * 16}, "add", {})
    put(root, "pruned", "e" * 16, {}, {"model": "m" * 20, "blocks": [1], "note": text if where == "dataset" else "x"})
    write(root / "pruned" / ("e" * 16) / "pruning.json", {"metric": "other", "removed_blocks": [1]})
    assert other.is_dir()
    outcome = reported(canaries, capsys)
    assert outcome.code == 0, outcome.stderr
    canaries.check(outcome.stderr)
    assert all(c.isprintable() or c == "\n" for c in outcome.stderr)
    out = canaries.work / "out"
    markdown = (out / "table.md").read_text()
    assert "<" not in markdown and "\\input" not in re.sub(r"\\\\", "", markdown)
    assert "](" not in markdown and "://" not in markdown
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("| ")]
    assert cells
    tex = (out / "table.tex").read_text()
    assert not re.search(r"\\(input|write18|frac)", tex)
    assert all(line.startswith("%") or "^^" not in line for line in tex.splitlines())
    with (out / "table.csv").open(newline="") as file:
        for row in csv.reader(file):
            for cell in row:
                assert re.fullmatch(r"-?[\d.e-]+", cell) or not cell.lstrip().startswith(tuple("=+-@\uff1d")), cell
    for file in out.iterdir():
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u202a-\u202e\u2066-\u2069]", file.read_text())


def test_hostile_text_everywhere_in_a_whole_report(
    whole: None, canaries: Canaries, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names, answers, labels and commands at once; plots and the page are drawn."""
    text = " ".join(HOSTILE[:-1])
    root = study(canaries.work / "artifacts", metric=text[:150], dataset=text, model="$\\frac{$")
    for stage, address in (("evaluated", TEACHER), ("evaluated", STUDENT), ("pruned", PRUNED)):
        for key, value in (("command", text), ("config", {"model": {"path": text}, text: text}), ("commit", text)):
            change(root / stage / address / "manifest.json", key, to=value)
    rows = [{"id": f"{text}{n}", "prompt": text, "answer": text, "response": text, "score": n % 2} for n in range(4)]
    for address in (TEACHER, STUDENT):
        write(root / "evaluated" / address / "samples" / "add.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    outcome = reported(canaries, capsys)
    assert outcome.code == 0, outcome.stderr
    html = (canaries.work / "out" / "report.html").read_text()
    assert len(html) > 100_000
    assert html.count("<script") == html.count("</script>") == 3
    assert not re.search(r"<(img|svg|b)[ >]", html.split("<script>")[0])
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069]", html)
    names = {path.name for path in (canaries.work / "out").iterdir()}
    assert {"table.json", "report.html", "tasks.png"} <= names
    canaries.check(outcome.stderr)


def test_a_scores_file_that_is_no_models_is_refused(
    paged: None, canaries: Canaries, capsys: pytest.CaptureFixture[str]
) -> None:
    root = study(canaries.work / "artifacts")
    scores = put(root, "scores", "f" * 16, {}, {"metric": "angular"})
    change(root / "pruned" / PRUNED / "manifest.json", "inputs", to={"scores": "f" * 16})
    for hostile in ({"1": [0.1] * 3000}, {"x": [0.1]}, {"1": ["a"]}, {"9" * 4000: [1.0]}, [1], {"1": [float("nan")]}):
        write(scores / "scores.json", {"metric": "angular", "num_blocks": 3, "distance": hostile})
        canaries.check_refused(reported(canaries, capsys))


# ---- the end of a sweep ---------------------------------------------------------------------------------------------

TRACKER = "_target_: pytorch_lightning.loggers.WandbLogger"
CONFIGS = [
    f"logger: {{{TRACKER}, project: '${{oc.env:SDD_SECRET}}'}}",
    f"logger: {{{TRACKER}, project: x, base_url: 'http://evil', save_dir: /tmp, log_model: all}}",
    f"logger: {{{TRACKER}, tags: ['${{oc.env:SDD_SECRET}}', ok], notes: [{{a: b}}]}}",
    "logger: {_target_: '${oc.env:SDD_SECRET}'}",
    "logger: [1, 2]",
    "[]",
    "logger: !!python/object/apply:os.system ['touch RAN']",
    "a: " + "[" * 3000,
    "a: &a [*a]\nlogger: *a",
    ": : :",
]


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:40])
def test_a_jobs_config_is_taken_as_written(text: str, canaries: Canaries) -> None:
    folder = canaries.work / "0"
    write(folder / ".hydra" / "config.yaml", canaries.fill(text))
    tracker = _tracker(folder)
    assert tracker is None or set(tracker) <= {"_target_", "project"}
    canaries.check(json.dumps(tracker))


def test_a_jobs_config_may_be_a_pipe(canaries: Canaries) -> None:
    (canaries.work / ".hydra").mkdir()
    os.mkfifo(canaries.work / ".hydra" / "config.yaml")
    assert _tracker(canaries.work) is None


def test_what_a_job_chose_is_kept(canaries: Canaries) -> None:
    settings = {"_target_": TRACKER.split()[1], "project": "sdd", "offline": True, "tags": ["a"]}
    write(canaries.work / ".hydra" / "config.yaml", yaml.safe_dump({"logger": settings}))
    assert _tracker(canaries.work) == settings


@pytest.mark.parametrize("text", ["[]", DEEP, '{"overrides": "x"}', '{"overrides": [], "code": "0"}', "\x00", "{}"])
def test_a_jobs_record_that_is_none_counts_as_failed(text: str, canaries: Canaries) -> None:
    write(canaries.work / "result.json", text)
    record = _record(canaries.work / "result.json")
    assert record["code"] == 1
    assert "result.json" in record["error"]


# ---- the page of an exported model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HOSTILE[:-1], ids=lambda text: ascii(text)[:30])
def test_names_stay_text_on_a_models_page(text: str, canaries: Canaries) -> None:
    root = study(canaries.work / "artifacts", metric=text)
    manifest = root / "pruned" / PRUNED / "manifest.json"
    change(manifest, "command", to=f"python prune.py {text}")
    change(manifest, "config", to={"model": {"path": text}, "dataset": {"hub": {"repository": text}}, "note": text})
    change(manifest, "versions", to={"torch": text})
    change(manifest, "commit", to=text)
    base = canaries.work / "base"
    stated = {"license": text, "license_link": f"javascript:{text}", "license_name": [text], "language": text}
    write(base / "README.md", f"---\n{yaml.safe_dump(stated)}---\n# Base\n")
    runtime = Runtime(sources={"m" * 20: base})
    line = lineage(Store(root), root / "pruned" / PRUNED)
    page = base_page(line, runtime)
    assert not {"license_link", "license_name"} & set(page)
    assert yaml.safe_load(front_matter(line, page).to_yaml())["tags"] == ["pruned"]
    card = model_card(Store(root), root / "pruned" / PRUNED, runtime)
    _, front, body = re.split(r"^---$", card, maxsplit=2, flags=re.M)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    prose = re.sub(r"^(`{3,})[a-z]*\n.*?^\1$", "", body, flags=re.M | re.S)
    prose = re.sub(r"`[^`\n]*`", "", re.sub(r"\\.", "", prose))
    assert "<" not in prose and "](" not in prose.replace("](https://huggingface.co/", "")
    assert prose.count("\n# ") + prose.startswith("# ") == 1
    assert not re.search(r"[\x00-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", card)
