"""Training targets of rows of your own: `mine/questions.jsonl`, by an option in `mine/conf/dataset/`.

PYTHONPATH=. python examples/own_dataset.py

Rows that have `prompt` and `reference`, under whatever names, need no class: `dataset=local dataset.path=FILE`. These
have choices to be put into words: a class in `mine/rows.py`.
"""

import json
from pathlib import Path

from sdd.api import compose

MINE = Path(__file__).parent / "mine"

words = ["dataset=choices", f"dataset.path={MINE / 'questions.jsonl'}", "allow=mine.rows.Choices"]
job = compose(*words, "finetune=sft", config_dir=MINE / "conf")
targets = job.wanted("generate")
for line in (job.build(targets) / "train.jsonl").read_text().splitlines():
    row = json.loads(line)
    print(f"{row['prompt']!r} -> {row['target']!r}")
