"""Evaluation elsewhere: by a server, against the same model in this process; and vLLM's model as far as it is here.

`transformers serve` gives no likelihoods of a prompt. So the server is one of this file: real HTTP, and a real model
that answers `echo` and `logprobs` as vLLM's server does. It can also be made to lack what servers lack.
"""

import ast
import asyncio
import gc
import importlib.util
import json
from collections import Counter
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import run
from model_server import Answer, ModelServer, refused

from sdd.architectures.configs import stock_config
from sdd.errors import UserError
from sdd.evaluation import backends, server
from sdd.evaluation.harness import Harness
from sdd.evaluation.tiny import suite_tasks
from sdd.models.checkpoints import Checkpoint
from sdd.models.served import Server
from sdd.store.files import read_jsonl

KEY = "of-a-test"
NEW = 8


class Serving(ModelServer):
    """A model behind `/v1/completions`, by the name of its folder; `lacks` is what it does not do, `statuses` those of
    the next answers (200 where none are left)."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint(folder)
        self.name, self.model, self.tokenizer = str(folder), checkpoint.model("float32"), checkpoint.tokenizer()
        self.lacks: set[str] = set()
        self.statuses: Iterator[int] = iter(())
        super().__init__(self.answered)

    @torch.no_grad()
    def answered(self, authorization: str | None, body: dict[str, Any]) -> Answer:
        prompt = body["prompt"]
        if (status := next(self.statuses, 200)) != 200:
            return status, {}, b"{}"
        if authorization != f"Bearer {KEY}":
            return 401, {}, refused("Incorrect API key")
        if body["model"] != self.name:
            return 404, {}, refused("no such model")
        if "ids" in self.lacks and not isinstance(prompt, str):
            return 400, {}, json.dumps({"detail": "prompt must be a string."}).encode()
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt[0]
        output = self.model.generate(torch.tensor([ids]), max_new_tokens=body["max_tokens"], do_sample=False)[0]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice["text"] = self.tokenizer.decode(output[len(ids) :], skip_special_tokens=True)
        for stop in body.get("stop") or () if "stop" not in self.lacks else ():
            choice["text"] = choice["text"].split(stop)[0]
        if body.get("echo") and "logprobs" not in self.lacks:
            scores = self.model(output[None]).logits[0].log_softmax(-1)
            own = [None, *(float(scores[at, token]) for at, token in enumerate(output[1:].tolist()))]
            best = [None, *({str(int(row.argmax())): float(row.max())} for row in scores[:-1])]
            choice["logprobs"] = {"token_logprobs": own, "top_logprobs": best}
        usage = {"prompt_tokens": len(ids) + ("first" in self.lacks), "completion_tokens": 1, "total_tokens": 1}
        answer = {"id": "1", "object": "text_completion", "model": self.name, "choices": [choice], "usage": usage}
        return 200, {}, json.dumps(answer).encode()


@pytest.fixture(scope="module")
def everything(checkpoint: Path) -> Iterator[Serving]:
    serving = Serving(checkpoint)
    yield serving
    serving.shutdown()


@pytest.fixture
def serving(everything: Serving, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    everything.asked.clear()
    yield everything
    everything.lacks.clear()
    everything.statuses = iter(())


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that lm-eval would wait before another try; it waits for none of them."""
    seconds: list[float] = []
    sleep = asyncio.sleep

    async def passed(delay: float) -> None:
        seconds.append(delay)
        await sleep(0)

    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=seconds.append))
    monkeypatch.setattr("asyncio.sleep", passed)
    return seconds


@pytest.mark.parametrize("prompt_ids", [True, False])
def test_records_are_those_of_this_process(prompt_ids: bool, serving: Serving, checkpoint: Path) -> None:
    """Answers to the letter, also of a server that passes over stop strings; likelihoods to rounding."""
    opened, tokenizer = Checkpoint(checkpoint), Checkpoint(checkpoint).tokenizer()
    serving.lacks = {"stop"} if prompt_ids else {"ids"}
    config = stock_config(opened.config, opened.where)
    place = Server(serving.url, 3, 0, 60.0, "evaluation")
    language_model = server.by_server(place, serving.name, prompt_ids, config, tokenizer)
    own = Harness(backends.in_process(opened.model("float32"), tokenizer, 4), tokenizer, NEW)
    served = Harness(language_model, tokenizer, NEW)
    for name in ("word", "fact_choice", "nll") if prompt_ids else ("word",):
        task = suite_tasks("tiny", [name], "dev", 0, 5)[name]
        for record, expected in zip(served.run(task), own.run(task), strict=True):
            assert record.keys() == expected.keys()
            for key, value in expected.items():
                close = key.startswith("log_likelihood")
                assert record[key] == (pytest.approx(value, abs=1e-4) if close else value), (name, key)
    assert all(isinstance(body["prompt"], str) is not prompt_ids for _, body in serving.asked)


NOBODY = Server("http://127.0.0.1:9/v1", group="evaluation")
MISTAKES = {
    "no likelihoods": ({"logprobs"}, {}, "gives no likelihoods of a prompt (0 of "),
    "no ids": ({"ids"}, {}, "add evaluation.prompt_ids=false"),
    "another tokenizer": ({"first"}, {}, "it serves another model"),
    "another name": (set(), {"model": "another"}, "refuses evaluation.model=another (404: "),
    "likelihoods as text": (set(), {"prompt_ids": False}, "fact_choice goes by likelihoods of token ids"),
    "nobody there": (
        set(),
        {"server": Server("http://127.0.0.1:9/v1", group="evaluation")},
        "no server can be reached",
    ),
    "no address": (set(), {"server": None}, "say where on the command line: evaluation.base_url="),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_server_that_will_not_do_costs_one_line(mistake: str, serving: Serving, checkpoint: Path) -> None:
    serving.lacks, settings, expected = MISTAKES[mistake]
    asked = {"server": Server(serving.url, group="evaluation"), "model": serving.name, "prompt_ids": True} | settings
    tokenizer = Checkpoint(checkpoint).tokenizer()
    with pytest.raises(UserError) as refusal:
        server.check(**asked, tokenizer=tokenizer, likelihoods=["fact_choice"])
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)
    if mistake == "no likelihoods":
        server.check(**asked, tokenizer=tokenizer, likelihoods=[])


def test_keys_and_packages_that_are_missing(
    serving: Serving, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Server(serving.url, group="evaluation"), serving.name, True, Checkpoint(checkpoint).tokenizer(), []
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    with pytest.raises(UserError, match=r"evaluation.base_url=.*refuses the key .*set OPENAI_API_KEY"):
        server.check(*asked)
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package aiohttp; run: pip install 'sdd\[server\]'"):
        server.check(*asked)


def test_a_likelihood_that_is_not_whole_is_none() -> None:
    """lm-eval itself takes the sum over no tokens, 0, for a likelihood."""
    record = {"token_logprobs": [None, -1.0, -2.0, -3.0], "top_logprobs": [None, {"a": -1.0}, {"b": -0.5}, {"c": -3.0}]}
    assert server.likelihood({"logprobs": record}, 3, 1) == (-3.0, False)
    assert server.likelihood({"logprobs": record}, 2, 1) == (-1.0, True)
    for lacking in ({}, {"logprobs": None}, {"logprobs": record | {"token_logprobs": [None, -1.0]}}):
        with pytest.raises(ValueError):
            server.likelihood(lacking, 3, 1)
    with pytest.raises(ValueError):
        server.likelihood({"logprobs": record | {"top_logprobs": None}}, 3, 1)


def test_evaluate_asks_a_server(serving: Serving, small: list[str], tmp_path: Path) -> None:
    """As this process answers; nothing of where the server is stays, and what is there is not asked again."""
    words = ["pruning=none", "finetune=none", "evaluation.backend=server", f"evaluation.model={serving.name}"]
    words += ["evaluation.concurrency=2", "evaluation.retries=0"]
    own = run("evaluate", *small, *words[:2], cwd=tmp_path).path
    outcome = run("evaluate", *small, *words, f"evaluation.base_url={serving.url}", cwd=tmp_path)
    samples = [{path.name: list(read_jsonl(path)) for path in (f / "samples").iterdir()} for f in (own, outcome.path)]
    assert samples[0].keys() == samples[1].keys() == {"arithmetic.jsonl", "fact_choice.jsonl"}
    assert samples[0]["arithmetic.jsonl"] == samples[1]["arithmetic.jsonl"]
    scores = [[row["score"] for row in of_one["fact_choice.jsonl"]] for of_one in samples]
    assert scores[0] == scores[1]
    manifest = json.loads((outcome.path / "manifest.json").read_text())
    assert manifest["spec"]["backend"] == {"kind": "server"} and manifest["spec"]["served_as"] == serving.name
    assert serving.url not in (outcome.path / "manifest.json").read_text()
    assert (
        run("evaluate", *small, *words, "evaluation.base_url=http://127.0.0.1:9/v1", cwd=tmp_path).path == outcome.path
    )


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_busy_server_is_asked_again(concurrency: int, serving: Serving, waits: list[float], checkpoint: Path) -> None:
    """One request after another and several at once are two ways of lm-eval's; answers and likelihoods go by either."""
    opened, tokenizer = Checkpoint(checkpoint), Checkpoint(checkpoint).tokenizer()
    place = Server(serving.url, concurrency, 1, 60.0, "evaluation")
    config = stock_config(opened.config, opened.where)
    harness = Harness(server.by_server(place, serving.name, True, config, tokenizer), tokenizer, NEW)
    for number, (name, task) in enumerate(suite_tasks("tiny", ["word", "fact_choice"], "dev", 0, 3).items(), 1):
        expected, asked = harness.run(task), len(serving.asked)
        serving.asked.clear()
        serving.statuses = iter([503])
        assert harness.run(task) == expected, name
        assert len(serving.asked) == asked + 1 and waits == [1.0] * number
        serving.asked.clear()


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_server_that_stays_busy_costs_one_line(
    concurrency: int,
    serving: Serving,
    waits: list[float],
    small: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After every try that `evaluation.retries` gives it; the same command then asks for the task that is missing."""
    words = ["pruning=none", "finetune=none", "evaluation.backend=server", f"evaluation.model={serving.name}"]
    words += [f"evaluation.base_url={serving.url}", f"evaluation.concurrency={concurrency}", "evaluation.retries=2"]
    check, arithmetic = 1, 3
    serving.statuses = chain([200] * (check + arithmetic), repeat(503))
    outcome = run("evaluate", *small, *words, cwd=tmp_path)
    assert (outcome.code, outcome.stdout) == (2, "")
    (line,) = outcome.errors
    assert f"evaluation.base_url={serving.url}: the server gives up (503 " in line and "finished tasks are kept" in line
    assert outcome.stderr.endswith(f"{line}\n") and "Traceback" not in outcome.stderr
    gc.collect()  # tasks say then that nobody heard of their failure
    assert not [record for record in caplog.records if record.name == "asyncio"]
    tries = Counter(str(body) for _, body in serving.asked[check + arithmetic :])
    assert max(tries.values()) == 3 and (len(tries) == 1 or concurrency > 1)
    assert set(waits) == {1.0}
    asked = len(serving.asked)
    serving.statuses = iter(())
    assert (run("evaluate", *small, *words, cwd=tmp_path).path / "samples" / "arithmetic.jsonl").is_file()
    assert not [body for _, body in serving.asked[asked + check :] if "logprobs" not in body]


WRONG = {
    "no name": (["evaluation.backend=server", "evaluation.base_url=http://a/v1"], "add evaluation.model=NAME"),
    "no server": (["evaluation.base_url=http://a/v1"], "belongs to evaluation.backend=server"),
    "a reference": (
        [
            *("evaluation.backend=server", "evaluation.model=m"),
            "evaluation.base_url=${study.url}",
            "+study.url=http://a",
        ],
        "say evaluation.base_url=",
    ),
    "no package": (["evaluation.backend=vllm"], "needs the package vllm"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_of_a_command(mistake: str, small: list[str], tmp_path: Path) -> None:
    words, expected = WRONG[mistake]
    if mistake == "no package" and importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    outcome = run("evaluate", *small, *words, cwd=tmp_path)
    assert (outcome.code, outcome.built) == (2, [])
    assert [expected in line for line in outcome.errors] == [True]


def test_vllms_model_has_a_place_for_what_it_is_told() -> None:
    """Read from lm-eval's file, which cannot be imported without vLLM; where that is installed, its class is made."""
    found = importlib.util.find_spec("lm_eval.models.vllm_causallms")
    assert found is not None and found.origin is not None
    (kind,) = (
        node
        for node in ast.parse(Path(found.origin).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "VLLM"
    )
    methods = {node.name: node for node in kind.body if isinstance(node, ast.FunctionDef)}
    known = {argument.arg for argument in methods["__init__"].args.args}
    assert set(backends.vllm_settings(Path("x"), "bfloat16")) <= known
    assert {"tok_encode", "apply_chat_template", "generate_until", "loglikelihood_rolling"} <= methods.keys()
    pytest.importorskip("vllm")
    assert backends._vllm().tok_encode is backends.ChatsElsewhere.tok_encode
