"""The student's own answers by a server that is handed the student at every window.

With ids there and back, as vLLM's server has them: a stand-in with real HTTP, and the real weights that it is given.
With text, and a checkpoint at every window: `transformers serve` itself, on the embedded model.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run, spawn
from model_server import Answer, ModelServer, refused
from peft import PeftModel
from test_server_engine import Serving

from sdd.errors import UserError
from sdd.finetuning.adapters import adapted, causal_lm
from sdd.models.chats import end_of_turn
from sdd.models.checkpoints import Checkpoint
from sdd.models.served import Server
from sdd.rewriting.continued import ServedStudent
from sdd.stages import handover
from sdd.stages.handover import Handover
from sdd.store import SCRATCH

ADAPTER = {"rank": 2, "alpha": 8, "dropout": 0.0, "targets": ["all-linear"]}


class Adapters(ModelServer):
    """A base that loads adapters while it runs, and continues token ids greedily; `lasts` is how many answers it gives
    before it is gone."""

    lists = True

    def __init__(self, base: Path) -> None:
        self.base, self.lasts, self.loaded = base, 1_000_000, dict[str, Any]()
        super().__init__(self.answered)

    @torch.no_grad()
    def answered(self, authorization: str | None, body: dict[str, Any]) -> Answer:
        name = body.get("lora_name")
        if "lora_path" in body:
            model = PeftModel.from_pretrained(Checkpoint(self.base).model("float32"), body["lora_path"])
            self.loaded[name] = model.eval()
        elif name is not None:
            assert not (self.loaded.pop(name).training)
        if name is not None:
            return 200, {"Content-Type": "text/plain"}, b"Success"
        if not self.lasts:
            return 503, {"Retry-After": "0"}, b"{}"
        self.lasts -= 1
        (prompt,) = body["prompt"]
        assert body["return_token_ids"] and body["temperature"] == 0
        output = self.loaded[body["model"]].generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=body["max_tokens"], do_sample=False
        )
        tokens = output[0, len(prompt) :].tolist()
        finish = "length" if len(tokens) == body["max_tokens"] and tokens[-1] != 2 else "stop"
        choice = {"index": 0, "finish_reason": finish, "text": "", "token_ids": tokens}
        return 200, {}, json.dumps({"id": "1", "object": "text_completion", "choices": [choice]}).encode()


def history_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open() as file:
        return list(csv.DictReader(file))


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


OWN = ["finetune=on_policy", "finetune.rollout_temperature=0", "finetune.rollout_steps=2", "finetune.epochs=1"]
OWN += ["finetune.rollout_tokens=[4,8]", "finetune.validation_rows=2"]


@pytest.fixture
def served(study: Path) -> Iterator[Adapters]:
    """A server that has the pruned student of the study."""
    (base,) = (study / "artifacts" / "pruned").iterdir()
    server = Adapters(base)
    yield server
    server.shutdown()


def test_a_server_that_has_the_students_adapter_writes_what_this_process_would(
    served: Adapters, small: list[str], copied: Path
) -> None:
    """It ends in the middle of a window, of which the rest is not asked for again; nothing of where it is stays."""
    words = [*small, *OWN, "rollouts.backend=vllm", "rollouts.retries=1", "rollouts.concurrency=2"]
    own = run("train", *small, *OWN, cwd=copied).path
    served.lasts = (
        8 + 2 + 1
    )  # a window of two steps, the held-out rows after the first of them, and one after the second
    ended = run("train", *words, f"rollouts.base_url={served.url}", cwd=copied)
    assert ended.code == 2 and ["the server gives up (503" in line for line in ended.errors] == [True]
    (scratch,) = (copied / "artifacts" / ".partial" / "tuned").glob(f"*/{SCRATCH}")
    assert [path.name for path in scratch.iterdir()] == ["step=1.ckpt"]
    assert not served.loaded
    served.lasts, before = 1_000_000, len(served.asked)
    tuned = run("train", *words, f"rollouts.base_url={served.url}", cwd=copied).path
    asked = [body for _, body in served.asked[before:] if "prompt" in body]
    assert len(asked) == 2 + 4 + 2
    assert len({body["model"] for body in asked}) == 3, "handed over anew each time"
    assert not served.loaded and not list(copied.rglob("student-*"))
    assert history_of(tuned) == history_of(own)
    assert adapter_of(tuned) == adapter_of(own)
    assert tuned != own and served.url not in (tuned / "manifest.json").read_text()


@pytest.mark.parametrize("method", ["lora", "head_and_norms", "full"])
def test_a_checkpoint_of_a_student_in_training(method: str, sharded_llama: Path, tmp_path: Path) -> None:
    """It says what the student says, ends where it ends, and is gone afterwards; the student stays as it is."""
    base, resets = Checkpoint(sharded_llama), []
    torch.manual_seed(0)
    student = adapted(base.model("float32"), ADAPTER if method == "lora" else {"method": method}, None)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    ids = torch.arange(5, 30)[None]
    server = ModelServer(lambda *asked: resets.append(asked) or (200, {}, b"{}"))
    place = Server(server.url, group="rollouts")
    handed = Handover(student, base, "pruned/0123456789abcdef", "float32", tmp_path)
    with handed.as_checkpoint(handover.client_of(place), place, [2, 7], True) as name:
        opened = Checkpoint(Path(name))
        made, settings = (
            opened.model("float32").double()(input_ids=ids).logits,
            json.loads((Path(name) / "generation_config.json").read_text()),
        )
        assert opened.tokenizer().chat_template == base.tokenizer().chat_template
    assert settings == {"eos_token_id": [2, 7], "do_sample": True, "top_k": 0}
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    said = causal_lm(student.double())(input_ids=ids).logits
    torch.testing.assert_close(made, said, rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.iterdir()) and len(resets) == 1
    server.shutdown()


@pytest.mark.parametrize(
    ("text", "finish", "kept"),
    [
        ("The answer is 7.", "stop", "The answer is 7.<|end|>"),
        ("The answer is 7.", "length", "The answer is 7."),
        (" The answer is <|end|> 7", "stop", None),
        ("", "stop", "<|end|>"),
        ("", "length", "<|end|>"),
        ("a b " * 40, "length", None),
    ],
)
def test_text_of_a_server_becomes_tokens(text: str, finish: str, kept: str | None, tokenizer: Any) -> None:
    """In its place behind the prompt; words are no control tokens; a loop and the limit end it."""
    prompt = tokenizer("<|user|>Reverse: abc<|end|><|assistant|>")["input_ids"]
    choice = {"index": 0, "finish_reason": finish, "text": text}
    body = json.dumps({"id": "1", "object": "text_completion", "choices": [choice]}).encode()
    server = ModelServer(lambda *_: (200, {}, body))
    end = end_of_turn(tokenizer)
    asking = ServedStudent(tokenizer, [end], 768, 60, True, 0.0, 0, Server(server.url, group="rollouts"))
    ((at, tokens),) = asking.continued("m", [prompt], ["r"], 50, lambda tokens, fresh: 9 if len(tokens) == 50 else None)
    assert at == 0 and 1 <= len(tokens) <= 50
    if kept is not None:
        assert tokens == tokenizer(kept, add_special_tokens=False)["input_ids"]
    elif finish == "stop":
        assert tokens.count(end) == 1 and tokens[-1] == end
        assert "<|end|>" in tokenizer.decode(tokens[:-1])
    else:
        assert len(tokens) == 9
    ((_, asked),) = server.asked
    assert asked["model"] == "m" and asked["prompt"] == "<|user|>Reverse: abc<|end|><|assistant|>"
    assert asked["max_tokens"] == 60 - len(prompt), "no more than the model reads"
    server.shutdown()


@pytest.fixture
def transformers_serve(tmp_path: Path) -> Iterator[Serving]:
    server = Serving(tmp_path / "log", pinned=False)
    server.wait()
    yield server
    server.kill()


@pytest.mark.peer
def test_transformers_serve_writes_what_this_process_would(transformers_serve: Serving, tmp_path: Path) -> None:
    """Greedily in float32, of a student whose words its tokenizer would cut alike; through a kill in a window, and by
    two processes that share the work, of which one asks."""
    words = ["model.dtype=float32", "metric=last", "pruning=n1", "dataset=tiny_math", "dataset.num_rows=24", *OWN]
    words += ["finetune.num_rows=18", "finetune.batch_size=6", "finetune.rollout_tokens=[8,24]"]
    words += ["trainer.checkpoint_every=1"]
    served = [*words, "rollouts.backend=transformers", f"rollouts.base_url={transformers_serve.url}"]
    own = run("train", *words, cwd=tmp_path / "own").path
    killed = spawn("train", *served, cwd=tmp_path)
    killed.until(lambda: bool(list(tmp_path.glob("artifacts/.partial/tuned/*/scratch/step=1.ckpt"))))
    killed.kill()
    tuned = run("train", *served, cwd=tmp_path).path
    assert history_of(tuned) == history_of(own)
    assert adapter_of(tuned) == adapter_of(own)
    assert not list(tmp_path.rglob("student-*"))
    shared = run("train", *served, "trainer.devices=2", "trainer.threads=1", cwd=tmp_path / "shared").path
    assert shared.name == tuned.name
    said = [[(row["rollout_tokens"], row["rollout_stopped"]) for row in history_of(one)] for one in (shared, tuned)]
    assert said[0] == said[1]


MISTAKES = {
    "no address": (None, "transformers", "say where on the command line: rollouts.base_url="),
    "nobody there": ("http://127.0.0.1:9/v1", "transformers", "no server can be reached there"),
    "nobody there for vllm": ("http://127.0.0.1:9/v1", "vllm", "no server can be reached there"),
    "another model": ("", "transformers", "the server refuses the student (400: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_server_that_cannot_write_costs_one_line(mistake: str, tmp_path: Path) -> None:
    url, backend, expected = MISTAKES[mistake]
    server = ModelServer(lambda *_: (400, {}, refused("Server is pinned to another")))
    place = None if url is None else Server(url or server.url, retries=0, group="rollouts")
    with pytest.raises(UserError) as refusal:
        handover.check(backend, place, tmp_path)
    assert expected in str(refusal.value) and "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())
    server.shutdown()
