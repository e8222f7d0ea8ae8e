"""Greedy generation: the project's loop side by side with transformers' `generate`, padded and one prompt at a time.

    python benchmarks/generation.py [--pairs 5] [--rows 192] [--models embedded synthetic] > generation.json

The same prompts, model and limit; every pair runs both ways one after the other in this process, the second first in
every other pair. `file order` is `generate` on left-padded batches of the same size in the order of the file, `batch 1`
is `generate` on one prompt at a time, for every sixth row. The embedded model rewrites references of `tiny_instruct`. A
random Llama has no words to repeat: its answers end at one of a share of its tokens, so that lengths are spread.
Seconds are the processor's on one thread, which others on the machine do not lengthen as they do the clock's; the
median of the pairs' ratios counts. A ratio is given only where every answer is the same, token by token. JSON goes to
stdout, a table to stderr. Expected: 3.5 times `file order`, 8 times `batch 1`.

What is left is told by where the loop's seconds go (the passes over prompts, the steps, the rest), and by `limit`: bare
passes over prompts with their answers, no cache, the head at the answers' tokens, as if every answer were known.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.models import random_llama
from benchmarks.rows import Ratio, paired, ratio
from sdd.forward import decoding
from sdd.forward.batches import padded
from sdd.forward.teacher_forcing import per_token
from sdd.models import checkpoints

WAYS = {"file order": 3.5, "batch 1": 8.0}
"""What the loop is compared with, and how many times as fast it is expected to be."""
EVERY = 6
"""Rows that are asked one at a time: one in so many."""
Answers = list[list[int]]


def embedded(rows: int) -> tuple[Any, Answers, list[int], int]:
    """(model, prompts, tokens that end an answer, limit of new tokens): rewriting with the embedded teacher."""
    from sdd.data.tiny import TinyTasks
    from sdd.models.chats import REWRITE_TEMPLATE, chat_prompt_ids, rewrite_prompt, stop_ids
    from sdd.models.checkpoints import Checkpoint

    checkpoint = Checkpoint(Path(__file__).resolve().parents[1] / "sdd" / "tiny" / "teacher")
    model, tokenizer = checkpoint.model("float32", attention="eager"), checkpoint.tokenizer()
    examples = TinyTasks(num_rows=rows).examples()
    texts = [rewrite_prompt(REWRITE_TEMPLATE, example.prompt, example.reference) for example in examples]
    prompts = [chat_prompt_ids(tokenizer, text) for text in texts]
    return model, prompts, stop_ids(tokenizer, model.generation_config), 128


def synthetic(rows: int) -> tuple[Any, Answers, list[int], int]:
    """The same of a random Llama: 12 blocks, hidden 512, 32,000 tokens of which one in 16 ends an answer."""
    import torch

    model = random_llama("eager", initializer_range=0.2).eval()
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 64, (rows,), generator=generator).tolist()
    prompts = [torch.randint(0, 32_000, (length,), generator=generator).tolist() for length in lengths]
    return model, prompts, list(range(0, 32_000, 16)), 32


MODELS = {"embedded": embedded, "synthetic": synthetic}


def generated(model: Any, prompts: Answers, stops: list[int], limit: int, batch_size: int) -> Answers:
    """By `generate`, in the order given, each answer cut behind the token that ends it."""
    import torch

    answers: Answers = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = padded(prompts[start : start + batch_size], left=0)
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=stops,
            )
        for tokens in output[:, ids.shape[1] :].tolist():
            end = next((at for at, token in enumerate(tokens) if token in stops), limit)
            answers.append(tokens[: end + 1])
    return answers


def decoded(model: Any, prompts: Answers, stops: list[int], limit: int, batch_size: int) -> Answers:
    answers = dict(decoding.decode(model, prompts, limit, stops, batch_size))
    return [answers[index] for index in range(len(prompts))]


def timed(way: Callable[[], Answers]) -> tuple[float, Answers]:
    started = time.process_time()
    answers = way()
    return time.process_time() - started, answers


def shares(model: Any, way: Callable[[], Answers]) -> dict[str, Any]:
    """Where the loop's seconds go, how many passes there are, and how many tokens they are over."""
    seconds, passes, tokens = {"prompts": 0.0, "steps": 0.0}, {"prompts": 0, "steps": 0}, {"prompts": 0, "steps": 0}
    running: list[float] = []

    def before(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        running.append(time.process_time())
        kind = "prompts" if module is not model and len(running) == 1 else "steps"
        if len(running) == 1:
            passes[kind] += 1
            tokens[kind] += named["input_ids"].numel()

    def after(module: Any, arguments: Any, output: Any) -> None:
        started = running.pop()
        if not running:
            seconds["steps" if module is model else "prompts"] += time.process_time() - started

    modules = (model, checkpoints.decoder(model))
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        total, _ = timed(way)
    finally:
        for handle in handles:
            handle.remove()
    return {"seconds": seconds | {"rest": total - sum(seconds.values())}, "passes": passes, "tokens": tokens}


def bare(model: Any, prompts: Answers, answers: Answers, batch_size: int) -> Answers:
    """One pass over every prompt with its answer."""
    rows = list(zip(prompts, answers, strict=True))
    per_token(lambda tokens, logits: logits.argmax(-1), rows, min(batch_size, 8), model)
    return answers


def compare(name: str, rows: int, batch_size: int, pairs: int) -> dict[str, Any]:
    """Seconds of every pair, by way; ratios are of seconds a row."""
    model, prompts, stops, limit = MODELS[name](rows)
    shown = {"file order": prompts, "batch 1": prompts[::EVERY]}
    assert rows % EVERY == 0, f"--rows is a multiple of {EVERY}"
    batches = {"file order": batch_size, "batch 1": 1}
    ways: dict[str, Callable[[], Answers]] = {
        way: lambda way=way: generated(model, shown[way], stops, limit, batches[way])  # type: ignore[misc]
        for way in WAYS
    }
    ways["sdd"] = lambda: decoded(model, prompts, stops, limit, batch_size)
    decoded(model, prompts[:2], stops, 2, 2)
    generated(model, prompts[:2], stops, 2, 2)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, Answers] = {}
    for number in range(pairs):
        for way in list(ways) if number % 2 else reversed(list(ways)):
            taken, answers[way] = timed(ways[way])
            seconds[way].append(taken)
    own = answers["sdd"]
    same = {
        way: sum(a == b for a, b in zip(answers[way], own[:: rows // len(shown[way])], strict=True)) for way in WAYS
    }
    result: dict[str, Any] = {
        "rows": rows,
        "batch": batch_size,
        "prompt_tokens": sum(map(len, prompts)),
        "answer_tokens": sum(map(len, own)),
        "longest_answer": max(map(len, own)),
        "seconds": seconds,
        "identical_rows": same,
    }
    if any(same[way] < len(shown[way]) for way in WAYS):
        return result
    result["ratios"] = {}
    for way in WAYS:
        ratios = [a / len(shown[way]) / (b / rows) for a, b in zip(seconds[way], seconds["sdd"], strict=True)]
        result["ratios"][way] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    result["shares"] = shares(model, ways["sdd"])
    result["limit"] = statistics.median(timed(lambda: bare(model, prompts, own, batch_size))[0] for _ in range(3))
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the ratios."""
    lines = ["| model | against | s | sdd, s | times as fast (range) | expected |", "|---|---|---|---|---|---|"]
    for name, result in results.items():
        own = statistics.median(result["seconds"]["sdd"])
        for way, faster in result.get("ratios", {}).items():
            other = statistics.median(result["seconds"][way]) * (EVERY if way == "batch 1" else 1)
            spread = f"{faster['median']:.2f} ({faster['lowest']:.2f} to {faster['highest']:.2f})"
            lines.append(f"| {name} | {way} | {other:.2f} | {own:.2f} | {spread} | {WAYS[way]} |")
        if "limit" in result:
            parts = ", ".join(f"{key} {value:.2f}" for key, value in result["shares"]["seconds"].items())
            lines.append(f"| {name} | bare passes | {result['limit']:.2f} | {own:.2f} | of which {parts} | |")
        else:
            lines.append(f"| {name} | | | | answers differ: the same are {result['identical_rows']} | |")
    return "\n".join(lines)


def rows(pairs: int = 5) -> list[Ratio]:
    """For the table of all benchmarks."""
    found = []
    for name, number in {"embedded": 192, "synthetic": 96}.items():
        result = compare(name, number, 64, pairs)
        same = "ratios" in result
        for way, goal in WAYS.items():
            scale = EVERY if way == "batch 1" else 1
            seconds = [scale * taken for taken in result["seconds"][way]]
            runs = list(zip(seconds, result["seconds"]["sdd"], strict=True))
            most = statistics.median(seconds) / result["limit"] if same else None
            peer = "`generate`, " + way
            parity = "every token" if same else ""
            found.append(ratio(f"rewriting, {name}, {number} rows", peer, runs, parity, goal=goal, limit=most))
    return found


def quick() -> float:
    """Seconds of bare passes over those of the loop."""
    model, prompts, stops, limit = embedded(24)
    answers = decoded(model, prompts, stops, limit, 16)
    runs, _, _ = paired(
        lambda: bare(model, prompts, answers, 16),
        lambda: decoded(model, prompts, stops, limit, 16),
        3,
        time.process_time,
    )
    return ratio("", "", runs, "").ratio


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    results = {name: compare(name, given.rows, given.batch, given.pairs) for name in given.models}
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    print(json.dumps({**machine, "threads": 1, "pairs": given.pairs, "models": results}, indent=1))
    print(table(results), file=sys.stderr)
    good = (
        "ratios" in result and all(result["ratios"][way]["median"] >= least for way, least in WAYS.items())
        for result in results.values()
    )
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
