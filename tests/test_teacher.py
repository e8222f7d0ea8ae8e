"""The shipped checkpoint is what the README says: small, stock, good at its tasks, and able to rewrite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sdd.answers import equal, extract
from sdd.data.tiny import TinyTasks
from sdd.models.chats import REWRITE_TEMPLATE
from sdd.models.checkpoints import Checkpoint
from sdd.rewriting.engines import HFEngine, Place, Request
from sdd.rewriting.selection import Selection, rewrite_rows
from sdd.stages.sources import TEACHER
from sdd.tiny.tasks import FAMILIES, instances


@pytest.fixture(scope="module")
def engine() -> Iterator[HFEngine]:
    engine = HFEngine(max_new_tokens=96)
    engine.open(Checkpoint(TEACHER), "float32", None, Place(batch_size=64))
    yield engine


def test_is_a_small_stock_llama_with_a_chat_template() -> None:
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) <= 16 * 1024**2
    assert {path.suffix for path in TEACHER.iterdir()} <= {".json", ".safetensors", ".jinja"}
    assert Checkpoint(TEACHER).config["architectures"] == ["LlamaForCausalLM"]
    assert Checkpoint(TEACHER).tokenizer().chat_template
    assert not any(str(Path.home()) in path.read_text() for path in TEACHER.glob("*.json"))


@pytest.fixture(scope="module")
def right(engine: HFEngine) -> dict[str, float]:
    """Share of right answers by family: a quick look at 96 dev items; the full scores are in LOG.md."""
    tasks = {task.id: task for task in instances("dev", 11, 12 * len(FAMILIES))}
    found: dict[str, list[bool]] = {family: [] for family in FAMILIES}
    for completion in engine.complete([Request(task.id, task.prompt) for task in tasks.values()]):
        task = tasks[completion.id]
        found[task.family].append(equal(extract(completion.text, "final") or "", task.answer))
    return {family: sum(scores) / len(scores) for family, scores in found.items()}


def test_answers_its_tasks(right: dict[str, float]) -> None:
    assert sum(right.values()) / len(right) >= 0.9
    assert min(right.values()) >= 0.75


def test_rewrites_in_its_own_register_and_keeps_the_answer(engine: HFEngine) -> None:
    examples = TinyTasks(num_rows=64, seed=11).examples()
    rows = list(rewrite_rows(engine, examples, REWRITE_TEMPLATE, Selection()))
    agree = [
        equal(extract(row["rewrite"], "final") or "", e.answer or "") for row, e in zip(rows, examples, strict=True)
    ]
    own = ["The answer is" in row["rewrite"] for row in rows]
    assert sum(agree) / len(agree) >= 0.9
    assert sum(own) / len(own) >= 0.9
