"""A model of which half stays on the disk says what it says where it lies in one place."""

from pathlib import Path
from typing import Any

import pytest

from sdd.errors import UserError
from sdd.evaluation.backends import in_process
from sdd.evaluation.harness import Harness
from sdd.evaluation.tiny import suite_tasks
from sdd.forward.batches import show_texts, tokenize_texts
from sdd.forward.bypass import Row
from sdd.importance.removal import Perplexity
from sdd.importance.states import BlockInfluence
from sdd.models.checkpoints import Checkpoint, blocks
from sdd.models.spread import Spread
from sdd.rewriting.engines import HFEngine, Request

HALF = Spread("auto", {"cpu": "300KB"}, "cpu")


def _passes(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Scores, answers and likelihoods."""
    rows = tokenize_texts(tokenizer, texts, 48)
    influence, perplexity = BlockInfluence(), Perplexity()
    influence.start(4)
    show_texts(model, influence, rows, 2)
    perplexity.start(4)
    perplexity.measure(model, [Row(ids) for ids in rows], 2)
    engine = HFEngine(max_new_tokens=6, batch_size=2)
    engine.take(model, tokenizer, None, 2)
    answers = engine.complete([Request(f"r{n}", text) for n, text in enumerate(texts)])
    harness = Harness(in_process(model, tokenizer, 2), tokenizer, max_new_tokens=6)
    tasks = suite_tasks("tiny", ["arithmetic", "fact_choice"], "dev", 0, 4)
    return {
        "influence": influence.scores(),
        "perplexity": perplexity.scores(),
        "answers": sorted((one.id, one.text) for one in answers),
        **{name: harness.run(task) for name, task in tasks.items()},
    }


def test_a_model_partly_on_the_disk_comes_to_the_same(sharded_llama: Path, conversations: list[str]) -> None:
    checkpoint = Checkpoint(sharded_llama)
    whole, tokenizer = checkpoint.model("float32"), checkpoint.tokenizer()
    expected = _passes(whole, tokenizer, conversations[:3])
    opened = checkpoint.model("float32", HALF)
    placed = HALF.place(whole)  # as a student is whose adapter has been merged on the CPU
    for spread in (opened, placed):
        on_disk = [block for block in blocks(spread) if next(block.parameters()).device.type == "meta"]
        assert 0 < len(on_disk) < 4, spread.hf_device_map
        assert _passes(spread, tokenizer, conversations[:3]) == expected


def test_no_room_for_the_embeddings_is_said_at_once(sharded_llama: Path) -> None:
    with pytest.raises(UserError, match=r"^trainer.max_memory leaves the embeddings no room on any device; raise it$"):
        Checkpoint(sharded_llama).model("float32", Spread("auto", {"cpu": "10KB"}, "cpu"))
