"""The stage that makes targets, on rewrites made by hand: which of several tries a row is trained on."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_server import Answer, ModelServer, refused, said

from sdd.data.local import LocalRows
from sdd.errors import UserError
from sdd.models.chats import answer_ids, chat_prompt_ids
from sdd.models.checkpoints import Checkpoint
from sdd.models.served import Server
from sdd.rewriting import judging
from sdd.rewriting.engines import Completion
from sdd.stages import targets
from sdd.stages.runtime import Runtime
from sdd.store import Recipe
from sdd.store.files import read_jsonl, write_jsonl

TRIES = ["the red hat", "a tree", "seven green birds sat on it", "a tree"]
BEFORE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path) -> Any:
    """A function from a choice, and a judge's server, to the targets of two rows, the second in a conversation; its
    third try was cut."""
    messages = [*BEFORE, {"role": "user", "content": "q"}, {"role": "assistant", "content": "reference"}]
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in ({"prompt": "p", "reference": "r"}, {"messages": messages}))
    )
    source = LocalRows(str(path))
    written = [
        {"id": e.id, **e.turns, "prompt": e.prompt, "reference": e.reference, "rewrite": TRIES[0], "finish": "stop"}
        for e in source.examples()
    ]
    for number, row in enumerate(written):
        ends = ["stop", "length" if number else "stop", "stop"]
        row["others"] = [{"rewrite": text, "finish": end} for text, end in zip(TRIES[1:], ends, strict=True)]
    (tmp_path / "rewrites").mkdir()
    write_jsonl(tmp_path / "rewrites" / "rewrites.jsonl", written)
    dataset = {"_target_": "sdd.data.local.LocalRows", **source.spec()}
    asked = {"teacher": "t", "dtype": "float32", "dataset": dataset, "template": "{prompt}", "system_prompt": None}
    upstream = Recipe("rewrites", 1, {**asked, "engine": {"kind": "hf"}, "all_tries": True}, {}, {})
    sources = {"t": tiny_llama, dataset["digest"]: path}

    def function(choice: str, judge: Server | None = None) -> list[dict[str, Any]]:
        runtime = Runtime(sources=sources, servers={"judge": judge} if judge else {})
        asked = {"model": "m", "template": judging.TEMPLATE, "max_new_tokens": 9} if choice == "judge" else None
        spec = {"mode": "self_distill", "rule": "none", "leak_phrases": [], "select": True, "gold_share": 0.0}
        recipe = Recipe(
            "targets", 1, {**spec, "noise_share": 0.0, "choice": choice, "judge": asked}, {"rewrites": upstream}, {}
        )
        folder = tmp_path / choice
        folder.mkdir(exist_ok=True)
        targets.build(runtime, recipe, {"rewrites": tmp_path / "rewrites"}, folder)
        return list(read_jsonl(folder / "train.jsonl"))

    return function


@torch.no_grad()
def test_the_most_likely_is_so_to_the_teacher(made: Any, tiny_llama: Path) -> None:
    """By the mean over tokens, the end of the turn among them, after the bare task and the turns before it."""
    model, tokenizer = Checkpoint(tiny_llama).model("float32"), Checkpoint(tiny_llama).tokenizer()

    def likelihood(text: str, *task: Any) -> float:
        prompt, answer = chat_prompt_ids(tokenizer, *task), answer_ids(tokenizer, text)
        scores = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        return sum(float(scores[len(prompt) - 1 + at, id]) for at, id in enumerate(answer)) / len(answer)

    first, second = made("most_likely")
    assert first["target"] == max(TRIES[:3], key=lambda text: likelihood(text, "p"))
    assert second["target"] == max(TRIES[:2], key=lambda text: likelihood(text, "q", None, BEFORE))
    assert second["before"] == BEFORE and "before" not in first
    assert {row["source"] for row in (first, second)} == {"rewrite"}


def test_the_shortest_and_the_first(made: Any) -> None:
    assert [row["target"] for row in made("shortest")] == [TRIES[1]] * 2
    assert [row["target"] for row in made("answer_correct")] == [TRIES[0]] * 2


# ---- a judge --------------------------------------------------------------------------------------------------------


def judge(choose: Callable[[list[str]], str]) -> ModelServer:
    """A server that reads the answers which it is asked about, and says something of them."""

    def answer(authorization: str | None, body: dict[str, Any]) -> Answer:
        (message,) = body["messages"]
        return 200, {}, said(choose(re.findall(r"Answer \d:\n(.*)\n", message["content"])))

    return ModelServer(answer)


def server(of: ModelServer) -> Server:
    return Server(of.url, 1, 1, 5.0, "judge")


def test_a_judge_chooses_among_the_rewrites_that_pass(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest, so that it is no other choice's; what is known is not asked again; the key is a judge's own."""
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-engine")
    monkeypatch.setenv("JUDGE_API_KEY", "of-a-judge")
    longest = judge(lambda texts: f"<think>1 or 2?</think>\n[{texts.index(max(texts, key=len)) + 1}]")
    assert [row["target"] for row in made("judge", server(longest))] == [TRIES[2], TRIES[0]]
    assert json.loads((tmp_path / "judge" / "summary.json").read_text())["judged"] == {"asked": 2, "unread": 0}
    assert {key for key, _ in longest.asked} == {"Bearer of-a-judge"}
    first, second = sorted((body["messages"][0]["content"] for _, body in longest.asked), key=len, reverse=True)
    assert "Task: p\n\nReference answer: r\n\nAnswer 1:\n" in first
    assert all(f"Answer {number}:" in first for number in (1, 2, 3)) and "Answer 4:" not in first
    assert "Task: Hi\n\nHello\n\nq\n\nReference answer: reference" in second and TRIES[2] not in second
    made("judge", server(longest))
    assert len(longest.asked) == 2


def test_what_a_judge_says_besides_leaves_the_first_try(made: Any, tmp_path: Path) -> None:
    undecided = judge(lambda texts: "Both 1 and 2 will do.")
    assert [row["target"] for row in made("judge", server(undecided))] == [TRIES[0]] * 2
    assert json.loads((tmp_path / "judge" / "summary.json").read_text())["judged"] == {"asked": 2, "unread": 2}


def test_a_judge_that_fails_costs_a_line_and_no_answer(made: Any) -> None:
    """It gives up after the first row; the same command then asks for the second alone."""
    answers = [(200, {}, said("1")), (503, {"Retry-After": "0"}, b"{}"), (503, {"Retry-After": "0"}, b"{}")]
    failing = ModelServer(lambda *_: answers.pop(0) if answers else (200, {}, said("1")))
    with pytest.raises(UserError, match=r"^judge\.base_url=.*: the server gives up \(503"):
        made("judge", server(failing))
    assert len(failing.asked) == 3
    assert {row["source"] for row in made("judge", server(failing))} == {"rewrite"}
    assert len(failing.asked) == 4
    refusing = ModelServer(lambda *_: (401, {}, refused("Incorrect API key")))
    with pytest.raises(UserError, match="set JUDGE_API_KEY in the environment"):
        judging.Judge("m", 9, server(refusing)).check(judging.Place(server=server(refusing)))
    with pytest.raises(UserError, match=r"^finetune\.choice=judge asks a server; .*: judge\.base_url=http://HOST/v1$"):
        list(judging.Judge("m", 9, None).complete([]))


@pytest.mark.parametrize(
    ("text", "finish", "number"),
    [
        ("2", "stop", 2),
        ("**Answer 1**.", "stop", 1),
        ("1 it is: 1", "stop", 1),
        ("2 is better than 1", "stop", None),
        ("4", "stop", None),
        ("0", "stop", None),
        ("\u0662", "stop", None),
        ("", "stop", None),
        ("2", "length", None),
        ("", "too_long", None),
        ("1</think>none", "stop", None),
        ("9" * 5000, "stop", None),
    ],
)
def test_a_verdict_is_one_number(text: str, finish: str, number: int | None) -> None:
    place = judging.verdict(Completion("row", text, finish), 3)
    assert place == (None if number is None else judging.shown("row", 3)[number - 1])


def test_a_question_is_filled_in_one_pass_and_in_no_fixed_order() -> None:
    asked = judging.question("{prompt}|{reference}|{answers}", "{answers}", "{prompt}", ["{reference}", "b"], "row")
    assert asked.startswith("{answers}|{prompt}|Answer 1:\n") and "{reference}" in asked
    orders = {tuple(judging.shown(f"row {number}", 3)) for number in range(60)}
    assert len(orders) == 6
