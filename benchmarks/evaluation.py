"""Likelihoods of lm-eval's tasks: its HFLM and this project's `SharedPrefixes` before it, in turns, in one process.

    python benchmarks/evaluation.py --data FOLDER --out DIR

FOLDER holds rows as `evaluation.data_dir` does. The model is a random Llama, the tokenizer a BPE of the rows, the
prompts those of the OpenLLM Leaderboard v1 with its number of examples. Times are CPU seconds of one thread, which a
busy machine changes least. HFLM takes the fastest of `--batch-sizes` per task, tried once before. Every pair computes
the same likelihoods, which are compared. `limit` is the decoder alone, without logits, over as many tokens as are
distinct. Writes DIR/evaluation.json and DIR/evaluation.md.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rows import Ratio, paired, ratio

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

Answers = list[tuple[float, bool]]
ITEMS = {"arc_challenge": 1, "hellaswag": 1, "mmlu_anatomy": 8}
"""Of every task, as many items as take some seconds."""


def rows_in(path: Path) -> list[Any]:
    with path.open() as file:
        return [json.loads(line) for line in file]


def words_of(value: Any) -> Iterator[str]:
    """All texts in a row of a task."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from words_of(member)


def make_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE with a beginning-of-sequence token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=2048
    )


def make_model(hidden: int, blocks: int, vocabulary: int) -> Any:
    """A random float32 Llama with a context of 2,048 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        initializer_range=0.05,
    )
    return LlamaForCausalLM(config).eval()


def requests_of(name: str, data: Path, items: int) -> list[Any]:
    """lm-eval's requests for the first items of a task, after as many examples as the leaderboard shows."""
    from sdd.evaluation.benchmark import Benchmark
    from sdd.evaluation.suites import SUITES

    shots = {task.task: task.shots for task in SUITES["openllm_v1"]}
    benchmark = Benchmark("lm_eval", [name], shots.get(name, shots["mmlu"]))
    task = benchmark.build(name, benchmark.local_files(data))
    task.build_all_requests(limit=items, rank=0, world_size=1)
    return list(task.instances)


def decisions(requests: list[Any], answers: Answers) -> dict[int, tuple[int, int]]:
    """Item -> (choice by likelihood, choice by likelihood a character)."""
    by_item: dict[int, list[tuple[float, float]]] = {}
    for request, (value, _) in zip(requests, answers, strict=True):
        by_item.setdefault(request.doc_id, []).append((value, value / len(request.args[1])))
    return {
        item: tuple(max(range(len(values)), key=lambda n: values[n][way]) for way in (0, 1))  # type: ignore[misc]
        for item, values in by_item.items()
    }


def timed(language_model: Any, requests: list[Any]) -> tuple[dict[str, float], Answers]:
    """CPU and wall seconds of the requests, tokenization included, and their answers."""
    wall, processor = time.perf_counter(), time.process_time()
    answers = language_model.loglikelihood(requests, disable_tqdm=True)
    return {"cpu": time.process_time() - processor, "wall": time.perf_counter() - wall}, answers


def size_of(language_model: Any, requests: list[Any]) -> dict[str, int]:
    """Tokens that HFLM passes without padding, those that are distinct, and the longest row."""
    from sdd.evaluation.prefixes import prefix_tree

    pairs = [language_model._encode_pair(*request.args) for request in requests]
    rows = [tuple(context + continuation)[-(language_model.max_length + 1) :][:-1] for context, continuation in pairs]
    pending, distinct = prefix_tree(rows, [len(continuation) for _, continuation in pairs]), 0
    while pending:
        node = pending.pop()
        distinct += len(node.tokens)
        pending += node.children
    cut = sum(len(context) + len(continuation) - 1 > language_model.max_length for context, continuation in pairs)
    return {"passed": sum(map(len, set(rows))), "distinct": distinct, "longest": max(map(len, rows)), "cut": cut}


def limit(model: Any, tokens: int, longest: int) -> float:
    """CPU seconds of the decoder over so many tokens, in rows of the longest row's length."""
    import torch

    started = time.process_time()
    with torch.no_grad():
        for start in range(0, tokens, longest):
            model.model(torch.ones(1, min(longest, tokens - start), dtype=torch.long), use_cache=False)
    return time.process_time() - started


def compare(model: Any, tokenizer: Any, requests: list[Any], batch_sizes: list[int], pairs: int) -> dict[str, Any]:
    from lm_eval.models.huggingface import HFLM

    from sdd.evaluation.likelihoods import SharedPrefixes

    shared = type("Shared", (SharedPrefixes, HFLM), {})(pretrained=model, tokenizer=tokenizer, batch_size=8)
    others = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in batch_sizes}
    tried = {size: timed(other, requests)[0]["cpu"] for size, other in others.items()} if len(others) > 1 else {}
    best = min(tried, key=tried.__getitem__) if tried else batch_sizes[0]
    runs, apart, differing, greedy = [], 0.0, 0, 0
    for _ in range(pairs):
        seconds, expected = timed(others[best], requests)
        own_seconds, answers = timed(shared, requests)
        runs.append({"hflm": seconds, "shared": own_seconds})
        apart = max(apart, *(abs(a[0] - b[0]) for a, b in zip(expected, answers, strict=True)))
        one, other = decisions(requests, expected), decisions(requests, answers)
        differing += sum(one[item] != other[item] for item in one)
        greedy += sum(a[1] != b[1] for a, b in zip(expected, answers, strict=True))
    size = size_of(shared, requests)
    ratios = [run["hflm"]["cpu"] / run["shared"]["cpu"] for run in runs]
    least = statistics.median(limit(model, size["distinct"], size["longest"]) for _ in range(3))
    return {
        "items": len({request.doc_id for request in requests}),
        "tokens": size,
        "batch_size": best,
        "tried": tried,
        "runs": runs,
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "seconds": {way: statistics.median(run[way]["cpu"] for run in runs) for way in ("hflm", "shared")}
        | {"limit": least},
        "parity": {"most_apart": apart, "decisions_differing": differing, "greedy_differing": greedy},
    }


def table(results: dict[str, Any]) -> str:
    lines = [
        "| task | items | tokens passed / distinct | HFLM CPU s | here | times faster [range] | limit | apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        seconds, ratio, tokens = result["seconds"], result["ratio"], result["tokens"]
        lines.append(
            f"| {name} | {result['items']} | {tokens['passed']} / {tokens['distinct']} | {seconds['hflm']:.2f} | "
            f"{seconds['shared']:.2f} | **{ratio['median']:.2f}** [{ratio['least']:.2f}, {ratio['most']:.2f}] | "
            f"{seconds['limit']:.2f} | {result['parity']['most_apart']:.1e} |"
        )
    return "\n".join(lines) + "\n"


GOALS = {"arc_challenge": 5.0, "hellaswag": 5.0, "mmlu_anatomy": 2.0}


def rows(data: Path, pairs: int = 5) -> list[Ratio]:
    """For the table of all benchmarks."""
    requests = {name: requests_of(name, data, items) for name, items in ITEMS.items()}
    texts = [text for path in sorted(data.rglob("*.jsonl")) for text in words_of(rows_in(path))]
    tokenizer, model = make_tokenizer(texts, 32_000), make_model(512, 12, 32_000)
    found = []
    for name, of_task in requests.items():
        result = compare(model, tokenizer, of_task, [1, 4], pairs)
        runs = [(run["hflm"]["cpu"], run["shared"]["cpu"]) for run in result["runs"]]
        apart, differing = result["parity"]["most_apart"], result["parity"]["decisions_differing"]
        parity = "" if differing or apart > 1e-3 else f"decisions; sums {apart:.0e} apart"
        most = result["seconds"]["hflm"] / result["seconds"]["limit"]
        found.append(ratio(f"likelihoods, {name}", "lm-eval's HFLM", runs, parity, goal=GOALS[name], limit=most))
    return found


def quick() -> float:
    """Seconds of the decoder over the distinct tokens, over those of likelihoods: questions after eight examples."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from sdd.data.tiny import TinyTasks
    from sdd.evaluation.likelihoods import SharedPrefixes
    from sdd.models.checkpoints import Checkpoint

    checkpoint = Checkpoint(Path(__file__).resolve().parents[1] / "sdd" / "tiny" / "teacher")
    model, tokenizer = checkpoint.model("float32"), checkpoint.tokenizer()
    examples = TinyTasks(num_rows=20).examples()
    shots = "".join(f"{example.prompt}\n{example.answer}\n\n" for example in examples[:8])
    requests = [
        Instance("loglikelihood", {}, (f"{shots}{example.prompt}\n", other.answer), number, doc_id=number)
        for number, example in enumerate(examples[8:])
        for other in examples[8:12]
    ]
    shared = type("Shared", (SharedPrefixes, HFLM), {})(pretrained=model, tokenizer=tokenizer, batch_size=8)
    size = size_of(shared, requests)
    runs, _, _ = paired(
        lambda: limit(model, size["distinct"], size["longest"]),
        lambda: shared.loglikelihood(requests, disable_tqdm=True),
        3,
        time.process_time,
    )
    return ratio("", "", runs, "").ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows of the tasks, as evaluation.data_dir")
    parser.add_argument("--out", type=Path, required=True, help="a folder for evaluation.json and evaluation.md")
    parser.add_argument(
        "--tasks", nargs="+", default=[f"{name}={items}" for name, items in ITEMS.items()], help="name=items"
    )
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4], help="what HFLM may choose from")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked = {name: int(items) for name, _, items in (task.partition("=") for task in arguments.tasks)}
    requests = {name: requests_of(name, arguments.data, items) for name, items in asked.items()}
    texts = [text for path in sorted(arguments.data.rglob("*.jsonl")) for text in words_of(rows_in(path))]
    tokenizer = make_tokenizer(texts, arguments.vocabulary)
    model = make_model(arguments.hidden, arguments.blocks, arguments.vocabulary)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = {}
    for name, of_task in requests.items():
        results[name] = compare(model, tokenizer, of_task, arguments.batch_sizes, arguments.pairs)
        (arguments.out / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "evaluation.md").write_text(table(results))
    print(table(results), end="")
    if any(result["parity"]["decisions_differing"] for result in results.values()):
        raise SystemExit("decisions differ from HFLM's")


if __name__ == "__main__":
    main()
