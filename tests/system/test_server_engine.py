"""Rewriting by a server: a real one, `transformers serve` on the embedded teacher; and small ones that misbehave.

That server knows no keys and always answers what was asked, so that what refuses keys, is busy or talks nonsense is a
stand-in of this file.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Condition, Event
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from launching import PATIENCE, REPOSITORY, Running, run, spawn
from model_server import Answer, ModelServer, refused, said

import sdd
from sdd.cli.program import main
from sdd.errors import UserError
from sdd.export.serving import free_port
from sdd.export.serving import serving as serving_of
from sdd.models.chats import chat_prompt_ids, completion_prompt
from sdd.models.checkpoints import Checkpoint
from sdd.models.served import Server
from sdd.rewriting.engines import HFEngine, Place, Request
from sdd.rewriting.journal import Journal
from sdd.rewriting.server import OpenAIEngine
from sdd.store.files import read_jsonl
from sdd.tiny.tasks import instances

TEACHER = Path(sdd.__file__).parent / "tiny" / "teacher"
ROWS = ["model.dtype=float32", "dataset=tiny_math", "dataset.num_rows=20", "finetune.validation_rows=4"]
ROWS += ["finetune.num_rows=16", "engine.max_new_tokens=72"]
"""The limit is one that no answer ends at: that server calls an answer cut whose end is the last token it may say."""
LONG = "pear " * 400


class Serving:
    """`transformers serve` in a process of its own, which can be killed and started again at its place; `pinned` to the
    teacher, or free to open what is asked for."""

    def __init__(self, log: Path, pinned: bool = True) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log, self.pinned, self.url = log, pinned, f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        program = Path(sys.executable).with_name("transformers")
        words = [
            *([str(TEACHER)] if self.pinned else []),
            "--port",
            str(self.port),
            "--host",
            "127.0.0.1",
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(program), "serve", *words], stdout=log, stderr=log, env={**os.environ}
            )

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def words(self) -> list[str]:
        return ["engine=openai", f"engine.base_url={self.url}", f"engine.model={TEACHER}", "engine.concurrency=3"]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    server = Serving(tmp_path_factory.mktemp("server") / "log")
    server.wait()
    yield server
    server.kill()


def rewrites_of(root: Path) -> list[dict[str, Any]]:
    (path,) = (root / "artifacts" / "rewrites").glob("*/rewrites.jsonl")
    return list(read_jsonl(path))


def journal_of(root: Path) -> list[str]:
    paths = list((root / "artifacts" / ".partial" / "rewrites").glob("*/scratch/*.answers.jsonl"))
    return paths[0].read_text().splitlines() if paths else []


def generate_until(rows: int, serving: Serving, cwd: Path, name: str) -> Running:
    """`generate.py` that asks the server, as soon as so many rows are answered."""
    process = spawn("generate", *ROWS, *serving.words, cwd=cwd, name=name)
    process.until(lambda: len(journal_of(cwd)) >= rows)
    return process


@pytest.mark.peer
def test_no_row_is_lost_or_asked_twice_by_kills_of_either_side(serving: Serving, tmp_path: Path) -> None:
    """The rows of a killed run are kept; a server that is killed and comes back is waited for; rows equal `hf`'s."""
    expected = run("generate", *ROWS, cwd=tmp_path / "hf")
    assert expected.code == 0, expected.stderr
    generate_until(4, serving, tmp_path, "killed").kill()
    kept = journal_of(tmp_path)
    (path,) = (tmp_path / "artifacts" / ".partial" / "rewrites").glob("*/scratch/*.answers.jsonl")
    with path.open("a") as file:
        file.write('{"id": "cut off')
    again = generate_until(len(kept) + 4, serving, tmp_path, "again")
    serving.kill()
    serving.start()
    outcome = again.outcome()
    assert outcome.code == 0, outcome.stderr
    assert rewrites_of(tmp_path) == rewrites_of(tmp_path / "hf")
    assert not [path for path in (tmp_path / "artifacts").rglob("manifest.json") if serving.url in path.read_text()]
    asked = serving.log.read_text().count("POST /v1/chat/completions")
    cut = 2 * 3  # requests in flight at a kill
    assert len(rewrites_of(tmp_path)) + 2 <= asked <= len(rewrites_of(tmp_path)) + 2 + cut  # two checks


@pytest.mark.peer
def test_a_student_is_served_while_a_command_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A fine-tuned one, which is no checkpoint yet; the server ends with the command, whose exit code is kept."""
    words = ["metric=last", "pruning=n1", "dataset=tiny_math", "dataset.num_rows=12", "finetune=sft"]
    words += ["finetune.num_rows=8", "finetune.validation_rows=2", "finetune.epochs=1"]
    student = run("train", *words, cwd=tmp_path).path
    ask = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1].replace('/v1', '/health')).status); sys.exit(7)"
    command = ["--", sys.executable, "-c", ask, "{url}", "{model}"]
    assert main(["serve", student.name, "--artifacts", str(tmp_path / "artifacts"), *command]) == 7
    printed, told = capfd.readouterr()
    assert printed == "200\n"
    url = re.search(r"(http://127\.0\.0\.1:\d+)/v1 serves .*/tuned|(http://127\.0\.0\.1:\d+)/v1 serves ", told)
    assert url is not None
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url[1] or url[2]}/health")


@pytest.mark.peer
def test_a_sweep_asks_the_server_that_is_started_for_it(tmp_path: Path) -> None:
    """Two jobs, one at either endpoint, answered as `hf` does; then the server's processes and port are gone."""
    expected = run("generate", *ROWS, cwd=tmp_path / "hf")
    assert expected.code == 0, expected.stderr
    sweep = ["engine=openai", "engine.base_url={url}", "engine.model={model}", "engine.endpoint=chat,completions"]
    script = [sys.executable, str(REPOSITORY / "generate.py"), "-m", *ROWS, *sweep]
    command = [sys.executable, "-m", "sdd", "serve", str(TEACHER), "--dtype", "float32", "--", *script]
    with (tmp_path / "stderr").open("w") as stderr:
        process = psutil.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=stderr)
    started: dict[psutil.Process, list[str]] = {}
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None:
        assert time.monotonic() < deadline, (tmp_path / "stderr").read_text()
        for one in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                started[one] = one.cmdline() or started.get(one, [])
        time.sleep(0.1)
    told = (tmp_path / "stderr").read_text()
    assert process.returncode == 0, told
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "artifacts/rewrites").glob("*/manifest.json")]
    assert sorted(manifest["spec"]["engine"]["endpoint"] for manifest in manifests) == ["chat", "completions"]
    for path in (tmp_path / "artifacts" / "rewrites").glob("*/rewrites.jsonl"):
        assert list(read_jsonl(path)) == rewrites_of(tmp_path / "hf"), path
    (port,) = re.findall(r"^http://127\.0\.0\.1:(\d+)/v1 serves ", told, re.M)
    assert [words for words in started.values() if "serve" in words and port in words]
    left = [one for one in started if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not left
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", int(port))):
        pass


def test_a_server_that_does_not_start_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such device')"]
    with (
        pytest.raises(UserError, match="ended with code 1: no such device"),
        serving_of(command, "http://127.0.0.1:9", 60, tmp_path / "log"),
    ):
        raise AssertionError("it never answered")
    assert main(["serve", "0123456789abcdef", "--artifacts", str(tmp_path)]) == 2
    assert main(["serve", str(TEACHER), "--draft", str(TEACHER)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True] * 2
    assert "--draft needs --program vllm" in lines[1]


ONCE = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Well(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[1])), Well).handle_request()
raise SystemExit("no room for two models")
"""


def test_a_server_that_ends_while_it_is_asked_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port("127.0.0.1")
    command = [sys.executable, "-c", ONCE, str(port)]
    others = {one.pid for one in psutil.Process().children()}
    with serving_of(command, f"http://127.0.0.1:{port}", 60, tmp_path / "log"):
        (server,) = (one for one in psutil.Process().children() if one.pid not in others)
        deadline = time.monotonic() + PATIENCE
        while server.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.01)
    assert capsys.readouterr().err.endswith(" ended with code 1: no room for two models\n")


def test_answers_equal_this_process(serving: Serving) -> None:
    serving.wait()
    place = Place(batch_size=8, server=Server(serving.url, concurrency=4))
    requests = [Request(f"r{number}", task.prompt) for number, task in enumerate(instances("pool", 5, 12))]
    requests.append(Request("long", LONG))
    own = HFEngine(max_new_tokens=24)
    own.open(Checkpoint(TEACHER), "float32", None, place)
    expected = {one.id: one for one in own.complete(requests)}
    assert {one.finish for one in expected.values()} == {"stop", "length", "too_long"}
    for endpoint in ("chat", "completions"):
        asking = OpenAIEngine(str(TEACHER), endpoint, max_new_tokens=24)
        asking.open(Checkpoint(TEACHER), "float32", None, place)
        answers = {one.id: one for one in asking.complete(requests)}
        assert answers == expected, endpoint
        assert answers["long"].finish == "too_long"


def test_a_prompt_as_text_has_the_tokens_of_the_chat(tokenizer: Any) -> None:
    text = completion_prompt(tokenizer, "Reverse: abc", "Be brief.")
    assert tokenizer(text)["input_ids"] == chat_prompt_ids(tokenizer, "Reverse: abc", "Be brief.")


def test_a_model_that_the_server_has_not(serving: Serving, tmp_path: Path) -> None:
    serving.wait()
    outcome = run("generate", *ROWS, *serving.words, "engine.model=another", cwd=tmp_path)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "engine.model=another" in line and "pinned to" in line
    assert not outcome.built


def test_a_server_judges(serving: Serving, tmp_path: Path) -> None:
    """The teacher, which knows numbers and no judging; where its server is stays nowhere."""
    words = ["engine.tries=2", "engine.temperature=1.5", "dataset.num_rows=4", "engine.max_new_tokens=16"]
    words += ["finetune.choice=judge", f"judge.model={TEACHER}", "judge.max_new_tokens=8", "finetune.select=false"]
    (nameless,) = run("generate", *ROWS, *words, "judge.model=null", cwd=tmp_path).errors
    assert "add judge.model=NAME" in nameless
    lacking = run("generate", *ROWS, *words, cwd=tmp_path)
    assert (lacking.code, lacking.built) == (2, []) and "judge.base_url=http://HOST/v1" in lacking.errors[0]
    serving.wait()
    folder = run("generate", *ROWS, *words, f"judge.base_url={serving.url}", cwd=tmp_path).path
    facts, rows = json.loads((folder / "summary.json").read_text()), read_jsonl(folder / "train.jsonl")
    tries = {row["id"]: {row["rewrite"], row["others"][0]["rewrite"]} for row in rewrites_of(tmp_path)}
    assert facts["judged"]["asked"] == sum(len(texts) == 2 for texts in tries.values()) > 0
    assert facts["judged"]["unread"] <= facts["judged"]["asked"] and facts["rows"] == 4
    assert all(row["target"] in tries[row["id"]] for row in rows if row["source"] == "rewrite")
    assert serving.url not in (folder / "manifest.json").read_text()
    nobody = "judge.base_url=http://127.0.0.1:9/v1"
    assert run("generate", *ROWS, *words, nobody, cwd=tmp_path).path == folder


# ---- servers that misbehave ---------------------------------------------------------------------------------------


def standing(*answers: Answer) -> ModelServer:
    """Answers from a list, the last one again and again."""
    left = list(answers)
    return ModelServer(lambda *_: left.pop(0) if len(left) > 1 else left[0])


def asking(server: ModelServer, **settings: Any) -> OpenAIEngine:
    engine = OpenAIEngine("m", **settings)
    engine.open(Checkpoint(TEACHER), "float32", None, Place(server=Server(server.url, 1, 2, 5.0)))
    return engine


OK: Answer = (200, {}, said("fine"))
MISTAKES = {
    "wrong key": ([(401, {}, refused("Incorrect API key"))], "set OPENAI_API_KEY"),
    "unknown model": ([(404, {}, refused("no such model"))], "engine.model=m (404: "),
    "page": ([(200, {"Content-Type": "text/html"}, b"<html>It works!</html>")], "no chat completion"),
    "torn": ([(200, {}, b'{"id": "1", "choi')], "no chat completion"),
    "no choices": ([(200, {}, b'{"choices": []}')], "no chat completion"),
    "a number": ([(200, {}, said(17))], "no chat completion"),
    "always busy": ([(503, {"Retry-After": "0"}, b"{}")], "the server gives up"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_no_answer_costs_one_line(mistake: str) -> None:
    answers, expected = MISTAKES[mistake]
    engine = asking(standing(*answers))
    for refuse in (lambda: list(engine.complete([Request("a", "b")])), lambda: engine.check(engine.place)):
        with pytest.raises(UserError) as refusal:
            refuse()
        assert expected in str(refusal.value) and engine.place.server.url in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_nobody_there(tmp_path: Path) -> None:
    """Before anything is computed, and the scripts' exit code is that of a mistake."""
    words = ["engine=openai", "engine.base_url=http://127.0.0.1:9/v1", "engine.model=m"]
    outcome = run("generate", *ROWS, *words, cwd=tmp_path)
    assert (outcome.code, outcome.built) == (2, [])
    assert "no server can be reached there" in outcome.errors[0]


def test_busy_servers_are_asked_again_and_long_prompts_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the prompts, whatever that of the rows, so that those which begin alike meet in caches."""
    monkeypatch.setenv("OPENAI_API_KEY", "of-a-test")
    long = (400, {}, refused("This model's maximum context length is 8 tokens", code="context_length_exceeded"))
    server = standing((429, {"Retry-After": "0"}, b"{}"), (500, {"Retry-After": "0"}, b"{}"), OK, long, OK)
    engine = asking(server, temperature=0.7, top_p=0.9, tries=2, seed=5)
    found = {one.id: one for one in engine.complete([Request("b", "second"), Request("a", "first")])}
    assert [(found[id].text, found[id].finish) for id in "ab"] == [("fine", "stop"), ("", "too_long")]
    assert {key for key, _ in server.asked} == {"Bearer of-a-test"}
    list(engine.complete([Request("a", "first", attempt=1)]))
    bodies = [body for _, body in server.asked]
    assert [body["messages"][-1]["content"] for body in bodies] == ["first"] * 3 + ["second", "first"]
    assert bodies[0] == bodies[2] and bodies[0]["seed"] != bodies[-1]["seed"]
    assert (bodies[0]["temperature"], bodies[0]["top_p"]) == (0.7, 0.9)


class Slow(ModelServer):
    """Answers each prompt after its own seconds, a time after another, at once where none are left; refuses `no`."""

    def __init__(self, **seconds: list[float]) -> None:
        super().__init__(self._answered)
        self.seconds, self.ended, self.one = seconds, Event(), contextlib.nullcontext()

    def _answered(self, _: str | None, body: dict[str, Any]) -> Answer:
        prompt = body["messages"][-1]["content"]
        waits = self.seconds.get(prompt, [])
        self.ended.wait(waits.pop(0) if waits else 0)
        return (401, {}, b"{}") if prompt == "no" else (200, {}, said(f"of {prompt}"))

    def times(self) -> Counter[str]:
        return Counter(body["messages"][-1]["content"] for _, body in self.asked)


def test_answers_that_do_not_come_in_time_are_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After waits that double and vary at random; `late` is answered after its time once, `never` at none of three
    times, which is told; what has been answered by then is kept, and the same call asks for the rest."""
    waits: list[float] = []
    monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=waits.append, time=time.time))
    server = Slow(late=[0.25], never=[60.0] * 3)
    engine = OpenAIEngine("m")
    engine.open(Checkpoint(TEACHER), "float32", None, Place(server=Server(server.url, 4, 2, 0.2)))
    requests = [Request(name, name) for name in ("a", "late", "never", "z")]
    path = tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match=r"no answer within engine\.timeout=0\.2 seconds; what is finished is kept"):
        list(Journal(engine, path).complete(requests))
    assert server.times()["never"] == 3 and server.times()["late"] >= 2
    assert sorted(read["id"] for read in read_jsonl(path)) == ["a", "late", "z"]
    assert len(waits) >= 3 and 0.3 < min(waits) <= 0.5 and 0.7 < max(waits) <= 1.0
    assert len(set(waits)) == len(waits) and not {0.5, 1.0} & set(waits)
    before = server.times()
    whole = {one.id: (one.text, one.finish) for one in Journal(engine, path).complete(requests)}
    assert whole == {name: (f"of {name}", "stop") for name in ("a", "late", "never", "z")}
    assert len(list(read_jsonl(path))) == 4 and set(server.times() - before) == {"never"}
    server.ended.set()


class Together(ModelServer):
    """Holds answers until `number` requests are under way, and each a little longer, lest one more came; `most` is how
    many there were at once. The question before all work has one of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(self._answered)
        self.number, self.under_way, self.most = number, 0, 0
        self.one, self.changed = contextlib.nullcontext(), Condition()

    def _answered(self, _: str | None, body: dict[str, Any]) -> Answer:
        if body["messages"][-1]["content"] != "Hello":
            with self.changed:
                self.under_way += 1
                self.most = max(self.most, self.under_way)
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.most >= self.number, 5)
            time.sleep(0.05)
            with self.changed:
                self.under_way -= 1
        return 200, {}, said("fine")


def test_as_many_requests_are_under_way_as_the_config_says(tmp_path: Path) -> None:
    server = Together(3)
    words = ["engine=openai", f"engine.base_url={server.url}", "engine.model=m", "engine.concurrency=3"]
    assert len(rewrites_of(run("generate", *ROWS, *words, "finetune.select=false", cwd=tmp_path).path.parents[2])) == 20
    assert (server.most, len(server.asked)) == (3, 21)


def test_what_is_on_its_way_when_another_fails_is_kept(tmp_path: Path) -> None:
    """And nothing more is asked."""
    server = Slow(no=[0.2], slow=[0.4])
    engine = OpenAIEngine("m")
    engine.open(Checkpoint(TEACHER), "float32", None, Place(server=Server(server.url, 2, 0, 5.0)))
    path = tmp_path / "answers.jsonl"
    with pytest.raises(UserError, match="the server refuses the key"):
        list(Journal(engine, path).complete([Request(name, name) for name in ("slow", "no", "then", "thereafter")]))
    assert [read["id"] for read in read_jsonl(path)] == ["slow"]
    assert server.times() == {"no": 1, "slow": 1}


def test_a_server_that_never_answers_costs_one_line(tmp_path: Path) -> None:
    server = Slow(Hello=[60.0] * 2)
    words = ["engine=openai", f"engine.base_url={server.url}", "engine.model=m", "engine.timeout=0.1"]
    outcome = run("generate", *ROWS, *words, cwd=tmp_path)
    server.ended.set()
    assert (outcome.code, outcome.built, outcome.stdout) == (2, [], "")
    (line,) = outcome.errors
    assert f"engine.base_url={server.url}: no answer within engine.timeout=0.1 seconds" in line


def test_a_journal_asks_for_what_it_lacks(tmp_path: Path) -> None:
    server = standing(OK)
    engine = asking(server)
    path = tmp_path / "answers.jsonl"
    first = list(Journal(engine, path).complete([Request("a", "x"), Request("b", "y")]))
    asked = len(server.asked)
    again = Journal(engine, path)
    assert sorted(one.id for one in again.complete([Request("a", "x"), Request("b", "y")])) == ["a", "b"]
    assert len(server.asked) == asked == len(first)
    list(again.complete([Request("a", "x", attempt=1)]))
    assert len(server.asked) == asked + 1


def test_where_and_how_a_server_is_asked_is_no_part_of_a_key() -> None:
    one = OpenAIEngine("m", base_url="http://a/v1", concurrency=1, retries=1, timeout=1.0, seed=3)
    assert one.spec() == OpenAIEngine("m", base_url="http://b/v1").spec()
    assert one.spec() != OpenAIEngine("n").spec() != OpenAIEngine("n", "completions").spec()
    rebuilt = OpenAIEngine(**{key: value for key, value in one.spec().items() if key != "kind"})
    assert rebuilt.spec() == one.spec()


# ---- rows leave for no server that a file names -------------------------------------------------------------------

SENT = "http://127.0.0.1:9/v1"
FILES = {
    "a setting": "defaults: [override /engine: openai]\nengine: {base_url: %s, model: m}",
    "a sweep": "defaults: [override /engine: openai]\nhydra: {sweeper: {params: {engine.base_url: '%s'}}}",
    "by a reference": "defaults: [override /engine: openai]\nstudy: {url: %s}\nengine: {base_url: '${study.url}'}",
    "a judge's": "judge: {base_url: %s, model: m}\nfinetune: {choice: judge}\nengine: {tries: 2, temperature: 0.7}",
    "a student's": "defaults: [override /finetune: on_policy]\nrollouts: {backend: transformers, base_url: %s}",
    "an evaluation's": "evaluation: {backend: server, base_url: %s, model: m}",
    "a student": "defaults: [override /merge: linear, override /engine: openai]\nengine: {model: m}\n"
    "merge: {students: [['engine.base_url=%s'], [seed=1]]}",
}


@pytest.mark.parametrize("way", FILES)
def test_a_file_names_no_server(way: str, tmp_path: Path) -> None:
    (tmp_path / "given" / "experiment").mkdir(parents=True)
    (tmp_path / "given/experiment/theirs.yaml").write_text(f"# @package _global_\n{FILES[way] % SENT}\n")
    words = ["--config-dir=given", "experiment=theirs", *(["-m"] if way == "a sweep" else []), "dry_run=true"]
    outcome = run("evaluate" if way == "a student" else "generate", *words, cwd=tmp_path)
    assert outcome.code == 2
    groups = {"an evaluation's": "evaluation", "a judge's": "judge", "a student's": "rollouts"}
    setting = f"{groups.get(way, 'engine')}.base_url"
    assert setting in outcome.stderr and not outcome.built


def test_the_command_line_names_it_by_itself(tmp_path: Path) -> None:
    referring = ["engine=openai", "+study.url=http://a/v1", "engine.base_url=${study.url}", "engine.model=m"]
    assert "say engine.base_url=" in run("generate", *ROWS, *referring, "dry_run=true", cwd=tmp_path).stderr
    words = ["engine=openai", f"engine.base_url={SENT}", "engine.model=m", "dry_run=true"]
    assert run("generate", *ROWS, *words, cwd=tmp_path).code == 0
    (lacking,) = run("generate", *ROWS, "engine=openai", "engine.model=m", cwd=tmp_path).errors
    assert "engine.base_url=" in lacking
    (nameless,) = run("generate", *ROWS, "engine=openai", f"engine.base_url={SENT}", cwd=tmp_path).errors
    assert "engine.model=" in nameless


@pytest.mark.parametrize("word", ["engine.api_key=hunter22", "+engine.api_key=hunter22"])
def test_a_key_is_no_setting(word: str, tmp_path: Path) -> None:
    words = ["engine=openai", f"engine.base_url={SENT}", "engine.model=m", word]
    outcome = run("generate", *ROWS, *words, cwd=tmp_path)
    assert (outcome.code, outcome.built, outcome.stdout) == (2, [], "")
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ") and "api_key" in line and "hunter22" not in line
