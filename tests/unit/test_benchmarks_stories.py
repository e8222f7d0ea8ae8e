"""The benchmarks' third model, which is given on the command line: its texts, and the rows made of them."""

import json
from pathlib import Path

from benchmarks import finetuning, generation
from benchmarks.models import TEACHER, writer_of_stories
from benchmarks.rows import Setting

STORIES = ["a bird can fly over the house and the tree", "one day a stone", "never read"]


def test_first_stories_are_read_and_cut(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": story * 9}) + "\n" for story in STORIES))
    model, rows = writer_of_stories((TEACHER, texts), 2, 40)
    assert [len(row) for row in rows] == [40, 40] and rows[0] != rows[1]
    setting = Setting(stories=(TEACHER, texts))
    _, learnt = finetuning.models(setting)["stories"](2)
    assert [row.ids[:40] for row in learnt] == rows and {row.prompt_length for row in learnt} == {32}
    assert "stories" not in finetuning.models(Setting())
    _, prompts, stops, _ = generation.stories((TEACHER, texts), 2)
    assert [len(prompt) for prompt in prompts] == [24, 35] and stops == [model.generation_config.eos_token_id]
