"""The stage that makes targets, on rewrites made by hand: which of several tries a row is trained on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdd.data.local import LocalRows
from sdd.models.chats import answer_ids, chat_prompt_ids
from sdd.models.checkpoints import Checkpoint
from sdd.stages import targets
from sdd.stages.runtime import Runtime
from sdd.store import Recipe
from sdd.store.files import read_jsonl, write_jsonl

TRIES = ["the red hat", "a tree", "seven green birds sat on it", "a tree"]
BEFORE = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def made(tiny_llama: Path, tmp_path: Path) -> Any:
    """A function from a choice to the targets of two rows, the second in a conversation; its third try was cut."""
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
    runtime = Runtime(sources={"t": tiny_llama, dataset["digest"]: path})

    def function(choice: str) -> list[dict[str, Any]]:
        spec = {"mode": "self_distill", "rule": "none", "leak_phrases": [], "select": True, "gold_share": 0.0}
        recipe = Recipe("targets", 1, {**spec, "noise_share": 0.0, "choice": choice}, {"rewrites": upstream}, {})
        folder = tmp_path / choice
        folder.mkdir()
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
