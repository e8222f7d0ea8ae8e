"""Rows that are conversations, from the file to the student; several rewrites of each, of which one is chosen."""

import json
import shutil
from pathlib import Path
from typing import Any

from launching import run

from sdd.store.files import read_jsonl
from sdd.tiny.tasks import instances

FEW = ["dataset.num_rows=null", "finetune.num_rows=8", "finetune.validation_rows=2", "finetune.epochs=1"]
ONE_TASK = (
    "{% if messages | length > 2 %}{{ raise_exception('one task only') }}{% endif %}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def conversations(path: Path, number: int) -> str:
    tasks = list(instances("pool", 9, 2 * number))
    rows = []
    for first, second in zip(tasks[::2], tasks[1::2], strict=True):
        said = [("user", first.prompt), ("assistant", first.gold), ("user", second.prompt), ("assistant", second.gold)]
        rows.append({"messages": [{"role": role, "content": content} for role, content in said]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(root: Path, name: str) -> list[dict[str, Any]]:
    (path,) = (root / "artifacts").glob(f"*/*/{name}")
    return list(read_jsonl(path))


def test_a_student_of_conversations(small: list[str], tmp_path: Path) -> None:
    """Every try is written, after the turns before it; one is the target; one generation serves both choices."""
    path = conversations(tmp_path / "rows.jsonl", 12)
    words = ["dataset=local", f"dataset.path={path}", *FEW, "finetune.same_rows=true", "finetune.select=false"]
    words += ["engine.tries=3", "engine.temperature=1.5"]
    student = run("train", *small, *words, "finetune.choice=shortest", cwd=tmp_path).path
    written, targets = rows_of(tmp_path, "rewrites.jsonl"), rows_of(tmp_path, "train.jsonl")
    assert [[turn["role"] for turn in row["before"]] for row in written] == [["user", "assistant"]] * 12
    assert [row["before"] for row in targets] == [row["before"] for row in written]
    for row, target in zip(written, targets, strict=True):
        tries = [one["rewrite"] for one in [row, *row["others"]] if one["rewrite"].strip()]
        assert len(row["others"]) == 2
        assert target["target"] == (min(tries, key=len) if tries else row["reference"])
    assert json.loads((student / "rows.json").read_text())["trained"] == 8
    again = run("generate", *small, *words, "finetune.choice=most_likely", cwd=tmp_path)
    assert [artifact.split("/")[0] for artifact in again.built] == ["targets"], again.stderr


def test_turns_that_a_template_refuses_cost_one_line(small: list[str], checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "chat_template.jinja").write_text(ONE_TASK)
    path = conversations(tmp_path / "rows.jsonl", 12)
    words = [f"model.path={tmp_path / 'model'}", "dataset=local", f"dataset.path={path}", *FEW]
    outcome = run("generate", *small, *words, cwd=tmp_path)
    assert (outcome.code, outcome.built) == (2, [])
    (line,) = outcome.errors
    assert "refuses the row '0' (user, assistant, user, assistant): one task only" in line


def test_a_choice_wants_several(small: list[str], tmp_path: Path) -> None:
    (line,) = run("generate", *small, "finetune.choice=shortest", cwd=tmp_path).errors
    assert "add engine.tries=4" in line
