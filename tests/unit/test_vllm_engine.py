"""vLLM's engine without vLLM, which is not installed in tests: a stand-in answers by the `hf` engine's model.

Where the package is installed, what is passed to it is held against its real signatures.
"""

import contextlib
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import sdd
import sdd.models.vllm
from sdd.errors import UserError
from sdd.export import serving
from sdd.models.checkpoints import Checkpoint
from sdd.rewriting.engines import HFEngine, Place, Request
from sdd.rewriting.vllm import VLLMEngine
from sdd.tiny.tasks import instances

TEACHER = Path(sdd.__file__).parent / "tiny" / "teacher"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stand-in was opened and asked with."""
    seen: dict[str, Any] = {"asked": []}

    class LLM:
        def __init__(self, model: str, **settings: Any) -> None:
            seen["opened"] = settings
            self.model = Checkpoint(Path(model)).model(settings["dtype"], "cpu")

        def generate(self, prompts: list[dict[str, list[int]]], how: list[dict[str, Any]], use_tqdm: bool) -> list[Any]:
            from sdd.forward.decoding import decode

            seen["asked"] += how
            rows, first = [prompt["prompt_token_ids"] for prompt in prompts], how[0]
            found = dict(decode(self.model, rows, first["max_tokens"], first["stop_token_ids"], 8))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(found[at]))]) for at in range(len(rows))]

    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    return seen


def test_answers_are_read_as_every_engines(stand_in: dict[str, Any]) -> None:
    requests = [Request(f"r{n}", task.prompt) for n, task in enumerate(instances("pool", 6, 10))]
    requests.append(Request("long", "pear " * 200))
    limits = {"max_new_tokens": 24, "max_prompt_tokens": 120}
    found = []
    for engine in (HFEngine(**limits), VLLMEngine(**limits)):
        engine.open(Checkpoint(TEACHER), "float32", None, Place(batch_size=8))
        found.append({one.id: (one.text, one.finish, one.tokens) for one in engine.complete(requests)})
    assert found[0] == found[1]
    assert {finish for _, finish, _ in found[1].values()} == {"stop", "length", "too_long"}
    assert stand_in["opened"]["trust_remote_code"] is False
    assert stand_in["opened"]["max_model_len"] == 144
    assert all(how["temperature"] == 0 and "seed" not in how for how in stand_in["asked"])


def test_a_model_with_less_room_than_the_limits_is_opened_with_what_it_has(stand_in: dict[str, Any]) -> None:
    """The embedded model has 256 places; vLLM refuses a model that is to have more, and a prompt that fills them."""
    engine = VLLMEngine(max_new_tokens=8, max_prompt_tokens=1024)
    engine.open(Checkpoint(TEACHER), "float32", None, Place())
    assert stand_in["opened"]["max_model_len"] == 256
    room = [Request("most", "pear " * 40), Request("over", "pear " * 255)]
    assert {one.id: one.finish == "too_long" for one in engine.complete(room)} == {"most": False, "over": True}
    assert engine.spec()["max_prompt_tokens"] == 1024


def test_every_try_draws_by_a_seed_of_its_own() -> None:
    engine = VLLMEngine(temperature=0.7, top_p=0.9, tries=2, seed=3)
    seeds = [
        engine.sampling(request, [2])["seed"] for request in (Request("a", ""), Request("a", "", 1), Request("b", ""))
    ]
    assert len(set(seeds)) == 3
    assert engine.sampling(Request("a", "other"), [2])["seed"] == seeds[0]


def test_ends_are_those_of_the_opened_model(tiny_llama: Path) -> None:
    for folder in (TEACHER, tiny_llama):
        engine = HFEngine()
        engine.open(Checkpoint(folder), "float32", None, Place())
        assert set(Checkpoint(folder).ending_ids) <= set(engine.stops)


def test_the_key_is_its_own_and_what_it_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package; and with a build of it for the other kind of device."""
    assert VLLMEngine().spec() == HFEngine().spec() | {"kind": "vllm"}
    with monkeypatch.context() as patch:
        patch.setattr(sdd.models.vllm, "find_spec", lambda name: None)
        with pytest.raises(
            UserError, match=r"^engine=vllm needs the package vllm; run: pip install 'vllm==0\.32\.\*', or choose"
        ):
            VLLMEngine().check(Place())
    monkeypatch.setattr(sdd.models.vllm, "find_spec", lambda name: object())
    for is_cpu, device, other in ((False, "cpu", "trainer=gpu"), (True, "cuda", "trainer=cpu")):
        platforms = ModuleType("vllm.platforms")
        platforms.current_platform = SimpleNamespace(is_cpu=lambda is_cpu=is_cpu: is_cpu)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
        with pytest.raises(UserError, match=f"^engine=vllm.* this build of vLLM.* add {other}, or choose"):
            VLLMEngine().check(Place(device))
        VLLMEngine().check(Place("cpu" if is_cpu else "cuda"))


def test_what_is_passed_has_a_place_in_the_packages_signatures() -> None:
    vllm = pytest.importorskip("vllm")
    known = {*inspect.signature(vllm.LLM.__init__).parameters, *inspect.signature(vllm.EngineArgs).parameters}
    assert {"model", *VLLMEngine().settings("bfloat16")} <= known
    sampled = VLLMEngine(temperature=0.7).sampling(Request("a", ""), [2])
    assert set(sampled) <= set(inspect.signature(vllm.SamplingParams).parameters)
    assert {"prompts", "sampling_params", "use_tqdm"} <= set(inspect.signature(vllm.LLM.generate).parameters)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """A function from the words after `sdd serve TEACHER` to those that `vllm` is started with; nothing is started."""
    commands: list[list[str]] = []

    @contextlib.contextmanager
    def nothing(command: Sequence[str], *_: Any) -> Iterator[None]:
        commands.append(list(command))
        yield

    def serve(*words: str) -> list[str]:
        with monkeypatch.context() as patch:
            (tmp_path / "vllm").touch()
            patch.setattr(sys, "executable", str(tmp_path / "python"))
            patch.setattr(serving, "serving", nothing)
            assert serving.main([str(TEACHER), "--program", "vllm", *words, "--", "true"]) == 0
        program, *given = commands.pop()
        assert program == str(tmp_path / "vllm")
        return given

    return serve


def test_a_student_drafts_for_the_model_that_vllm_serves(
    started: Callable[..., list[str]], tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = started("--port", "8123", "--dtype", "float32")
    assert alone == ["serve", str(TEACHER), "--host", "127.0.0.1", "--port", "8123", "--dtype", "float32"]
    monkeypatch.chdir(tiny_llama.parent)  # vLLM is given a whole path
    for words, tokens in ((["--draft-tokens", "3"], 3), ([], 4)):
        *rest, name, settings = started("--port", "8123", "--dtype", "float32", "--draft", tiny_llama.name, *words)
        assert (rest, name) == (alone, "--speculative-config")
        assert json.loads(settings) == {"model": str(tiny_llama), "num_speculative_tokens": tokens}


def test_what_a_server_is_started_with_is_read_by_the_packages_parser(
    started: Callable[..., list[str]], tiny_llama: Path
) -> None:
    pytest.importorskip("vllm")
    from vllm.config import SpeculativeConfig
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    words = ["--host", "127.0.0.2", "--port", "8123", "--dtype", "float32"]
    draft = {"model": str(tiny_llama), "num_speculative_tokens": 3}
    for more, expected in (([], None), (["--draft", str(tiny_llama), "--draft-tokens", "3"], draft)):
        read = parser.parse_args(started(*words, *more))
        assert (read.model_tag, read.host, read.port, read.dtype) == (str(TEACHER), "127.0.0.2", 8123, "float32")
        assert read.speculative_config == expected
    assert set(draft) <= {field.name for field in dataclasses.fields(SpeculativeConfig)}
