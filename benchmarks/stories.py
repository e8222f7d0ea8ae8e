"""Recovery of a writer of children's stories, which follows no instruction and was not trained for being cut.

    python -m benchmarks.stories MODEL LOWER.jsonl.gz STORIES.jsonl [--ways sft ...] [--rates 1e-3 ...] [--seeds 0 1 2]
                                 [--rows sft=320 ...] [--pool 400] [--out FOLDER] [--split test]

`MODEL` is a checkpoint such as stories260K; `LOWER` are stories in small letters, whose beginnings are the prompts and
whose rest the references; `STORIES` are such as the model learned. One block is cut, and every way trains on the same
320 rows, or on as many of the `--pool` as `--rows` says, for equal compute. A line of JSON a student says its price in
GFLOPs, as a report has it, and on half of `STORIES` (the other half is the dev split): nats a token of whole
stories; and of greedy continuations of their beginnings, how many of all runs of four words are distinct (1: none comes
twice), over all of them and within one, and the share that ends in copies of itself. No suite asks for stories, so that
this is a script; students are artifacts as ever.
"""

import argparse
import gzip
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WAYS = ("sft", "teacher_answers", "logit_distill", "reverse_kl", "skew_kl", "jsd", "taid", "total_variation", "dac_kl")
WAYS += ("hidden_states", "relations", "on_policy")
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}"
TEMPLATE += "{{ eos_token }}{% endif %}{% endfor %}"
"""A story is its beginning and the rest, with no words between."""
BEGINNING, LONGEST, NEW = 20, 110, 120
"""Words of a prompt, of a story at most; tokens of an answer."""


def words_of(path: Path) -> Iterator[list[str]]:
    """Stories as words, shortened."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    for line in text.splitlines():
        words = json.loads(line)["text"].split()
        if len(words) > 2 * BEGINNING:
            yield words[:LONGEST]


def prepared(model: Path, lower: Path, pool: int, out: Path) -> tuple[Path, Path]:
    """The model with a template of stories, and the rows of the dataset."""
    folder, rows = out / "model", out / "rows.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir():
        shutil.copytree(model, folder)
        for path in folder.iterdir():
            path.chmod(0o644)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    with rows.open("w") as file:
        for words in list(words_of(lower))[:pool]:
            row = {"prompt": " ".join(words[:BEGINNING]), "reference": " " + " ".join(words[BEGINNING:])}
            file.write(json.dumps(row) + "\n")
    return folder, rows


def distinct(texts: list[str], size: int = 4) -> float:
    """Distinct runs of `size` words over all of them."""
    words = [text.split() for text in texts]
    runs = [tuple(one[at : at + size]) for one in words for at in range(len(one) - size + 1)]
    return len(set(runs)) / max(1, len(runs))


def measured(model: Any, tokenizer: Any, stories: list[list[str]]) -> dict[str, float]:
    from sdd.analysis.shift import token_nll
    from sdd.report.health import repeats
    from sdd.rewriting.engines import HFEngine, Request

    ids = [tokenizer(" ".join(words))["input_ids"] for words in stories]
    values = token_nll(model, [(one[:1], one[1:]) for one in ids], 32)
    engine = HFEngine(max_new_tokens=NEW)
    engine.take(model, tokenizer, None, 32)
    requests = [Request(str(at), " ".join(words[:BEGINNING])) for at, words in enumerate(stories)]
    texts = [one.text for one in sorted(engine.complete(requests), key=lambda one: int(one.id))]
    nats, tokens = sum(map(sum, values)), sum(map(len, values))
    return {
        "nats_a_token": nats / tokens,
        "distinct": distinct(texts),
        "distinct_within": fmean(distinct([text]) for text in texts),
        "repeated": fmean(map(repeats, texts)),
        "words": fmean(len(text.split()) for text in texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "lower", "stories"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--ways", nargs="+", default=["none", *WAYS], choices=["none", *WAYS])
    parser.add_argument("--rates", nargs="+", default=["1e-3"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", default=[], help="rows of a way, such as sft=960; others have 320")
    parser.add_argument("--pool", type=int, default=400)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--out", type=Path, default=Path("outputs/stories"))
    options = parser.parse_args()
    from sdd.api import compose
    from sdd.models.checkpoints import Checkpoint
    from sdd.report.library import Library, read_artifact
    from sdd.report.price import Prices
    from sdd.stages.student import open_student

    folder, rows = prepared(options.model, options.lower, options.pool, options.out)
    numbers = dict(one.split("=") for one in options.rows)
    stories = list(words_of(options.stories))[options.split == "test" :: 2]
    teacher = Checkpoint(folder).model("float32", "cpu", "eager")
    said = measured(teacher, Checkpoint(folder).tokenizer(), stories)
    print(json.dumps({"way": "unpruned", "stories": len(stories), **said}), flush=True)
    for way in options.ways:
        settings = (
            [(rate, seed) for rate in options.rates for seed in options.seeds] if way != "none" else [("1e-3", 0)]
        )
        for rate, seed in settings:
            job = compose(
                *(
                    "model=local",
                    f"model.path={folder}",
                    "model.dtype=float32",
                    "dataset=local",
                    f"dataset.path={rows}",
                ),
                *(
                    "pruning=n1",
                    f"finetune={way}",
                    f"finetune.learning_rate={rate}",
                    f"seed={seed}",
                    "trainer.threads=1",
                ),
                *(
                    f"finetune.num_rows={numbers.get(way, 320)}",
                    "finetune.validation_rows=32",
                    "finetune.epochs=1",
                    "finetune.batch_size=16",
                ),
                *(
                    "finetune.max_length=512",
                    "adapter.rank=4",
                    f"engine.max_new_tokens={NEW}",
                    "calibration=local",
                    f"calibration.path={options.lower}",
                ),
                f"paths.artifacts={options.out / 'artifacts'}",
            )
            student = job.build(job.wanted("train" if way != "none" else "prune"))
            model, base = open_student(student, job._runtime(), "float32")
            price = Prices(Library([options.out / "artifacts"])).of(read_artifact(student))
            line = {"way": way, "rows": int(numbers.get(way, 320)), "rate": float(rate), "seed": seed}
            line |= {"gflops": price and round(price.total / 1e9, 1), **measured(model, base.tokenizer(), stories)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
