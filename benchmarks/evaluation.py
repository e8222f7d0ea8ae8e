"""Likelihoods of lm-eval's tasks: its HFLM and this project's `SharedPrefixes` before it, in turns, in one process.

    python -m benchmarks evaluation --data FOLDER

FOLDER holds rows as `evaluation.data_dir` does. The model is a random Llama, the tokenizer a BPE of the rows, the
prompts those of the OpenLLM Leaderboard v1 with its number of examples. Times are CPU seconds of one thread, which a
busy machine changes least, or a GPU's, with tokenization. HFLM takes the fastest of `BATCH_SIZES` per task, tried once
before. Every turn computes the same likelihoods, which are compared. The limit is the decoder alone, without logits,
over as many tokens as are distinct.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.models import TEACHER, random_llama
from benchmarks.rows import Ratio, Setting
from benchmarks.timing import clocked, in_turns, share, timed

Answers = list[tuple[float, bool]]
ITEMS = {"arc_challenge": 3, "hellaswag": 3, "mmlu_anatomy": 8}
"""Of every task, as many items as take some seconds."""
GOALS = {"arc_challenge": 5.0, "hellaswag": 5.0, "mmlu_anatomy": 2.0}
BATCH_SIZES = (1, 4)
"""What HFLM may choose from."""


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


def likelihoods(language_model: Any, requests: list[Any]) -> Answers:
    answers: Answers = language_model.loglikelihood(requests, disable_tqdm=True)
    return answers


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


def bare(model: Any, tokens: int, longest: int) -> None:
    """The decoder over so many tokens, in rows of the longest row's length."""
    import torch

    with torch.no_grad():
        for start in range(0, tokens, longest):
            ids = torch.ones(1, min(longest, tokens - start), dtype=torch.long, device=model.device)
            model.model(ids, use_cache=False)


def apart(expected: Answers, answers: Answers) -> float:
    return max(abs(a - b) for (a, _), (b, _) in zip(expected, answers, strict=True))


def compared(name: str, requests: list[Any], model: Any, tokenizer: Any, setting: Setting) -> Ratio:
    from lm_eval.models.huggingface import HFLM

    from sdd.evaluation.likelihoods import SharedPrefixes

    shared = type("Shared", (SharedPrefixes, HFLM), {})(pretrained=model, tokenizer=tokenizer, batch_size=8)
    others = {size: HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in BATCH_SIZES}
    tried = {size: timed(partial(likelihoods, other, requests), setting.device)[0] for size, other in others.items()}
    best, size = min(tried, key=tried.__getitem__), size_of(shared, requests)
    ways: dict[str, Callable[[], Any]] = {
        "hflm": partial(likelihoods, others[best], requests),
        "sdd": partial(likelihoods, shared, requests),
        "limit": partial(bare, model, size["distinct"], size["longest"]),
    }
    taken, said = in_turns(clocked(ways, setting.device), setting.turns)
    distance = max(map(apart, said["hflm"], said["sdd"]))
    same = all(
        decisions(requests, one) == decisions(requests, other)
        for one, other in zip(said["hflm"], said["sdd"], strict=True)
    )
    parity = f"decisions; sums {distance:.0e} apart" if same and distance <= 1e-4 else ""
    what, peer, details = f"likelihoods, {name}", "lm-eval's HFLM", {"tokens": size, "tried": tried}
    return Ratio(what, peer, taken["hflm"], taken["sdd"], taken["limit"], parity, GOALS[name], details)


def rows(setting: Setting) -> list[Ratio]:
    if setting.data is None:
        print("evaluation: left out, it needs --data", file=sys.stderr)
        return []
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    requests = {name: requests_of(name, setting.data, items) for name, items in ITEMS.items()}
    texts = [text for path in sorted(setting.data.rglob("*.jsonl")) for text in words_of(rows_in(path))]
    tokenizer = make_tokenizer(texts, 32_000)
    model = random_llama(initializer_range=0.05, max_position_embeddings=2048).to(setting.device)
    return [compared(name, of_task, model, tokenizer, setting) for name, of_task in requests.items()]


def quick() -> float:
    """Seconds of the decoder over the distinct tokens, over those of likelihoods: questions after eight examples."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from sdd.data.tiny import TinyTasks
    from sdd.evaluation.likelihoods import SharedPrefixes
    from sdd.models.checkpoints import Checkpoint

    checkpoint = Checkpoint(TEACHER)
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
    limit = partial(bare, model, size["distinct"], size["longest"])
    return share(limit, partial(likelihoods, shared, requests))
