"""Greedy generation: the project's loop side by side with transformers' `generate`, padded and one prompt at a time.

    python -m benchmarks generation

The same prompts, model and limit of new tokens. `file order` is `generate` on left-padded batches of the same size in
the order of the file, `batch 1` is `generate` on one prompt at a time, for every sixth row. The embedded model rewrites
references of `tiny_instruct`. A random Llama has no words to repeat: its answers end at one of a share of its tokens,
so that lengths are spread. A writer of stories, if one is given, goes on from their beginnings. Seconds are the
processor's on one thread, which others on the machine do not lengthen as they do the clock's, or a GPU's. A ratio is
given only where every answer is the same, token by token.

What is left is told by where the loop's seconds go (the passes over prompts, the steps, the rest), and by the limit:
bare passes over prompts with their answers, no cache, the head at the answers' tokens, as if every answer were known.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.models import TEACHER, random_llama, writer_of_stories
from benchmarks.rows import Ratio, Setting
from benchmarks.timing import clocked, in_turns, share, timed
from benchmarks.timing import seconds as clock
from sdd.forward import decoding
from sdd.forward.batches import padded
from sdd.forward.teacher_forcing import per_token
from sdd.models import checkpoints

WAYS = {"file order": 3.5, "batch 1": 8.0}
"""What the loop is compared with, and how many times as fast it is expected to be."""
EVERY = 6
"""Rows that are asked one at a time: one in so many."""
Answers = list[list[int]]
Made = Callable[[int], tuple[Any, Answers, list[int], int]]


def embedded(rows: int) -> tuple[Any, Answers, list[int], int]:
    """(model, prompts, tokens that end an answer, limit of new tokens): rewriting with the embedded teacher."""
    from sdd.data.tiny import TinyTasks
    from sdd.models.chats import REWRITE_TEMPLATE, chat_prompt_ids, rewrite_prompt, stop_ids
    from sdd.models.checkpoints import Checkpoint

    checkpoint = Checkpoint(TEACHER)
    model, tokenizer = checkpoint.model("float32"), checkpoint.tokenizer()
    examples = TinyTasks(num_rows=rows).examples()
    texts = [rewrite_prompt(REWRITE_TEMPLATE, example.prompt, example.reference) for example in examples]
    prompts = [chat_prompt_ids(tokenizer, text) for text in texts]
    return model, prompts, stop_ids(tokenizer, model.generation_config), 128


def synthetic(rows: int) -> tuple[Any, Answers, list[int], int]:
    """The same of a random Llama: 12 blocks, hidden 512, 32,000 tokens of which one in 16 ends an answer."""
    import torch

    model = random_llama(initializer_range=0.2)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 64, (rows,), generator=generator).tolist()
    prompts = [torch.randint(0, 32_000, (length,), generator=generator).tolist() for length in lengths]
    return model, prompts, list(range(0, 32_000, 16)), 32


def stories(given: tuple[Path, Path], rows: int) -> tuple[Any, Answers, list[int], int]:
    """The same of a writer of stories that goes on from their beginnings, of 24 to 87 tokens."""
    from sdd.models.chats import stop_ids
    from sdd.models.checkpoints import Checkpoint

    model, texts = writer_of_stories(given, rows, 256)
    prompts = [text[: 24 + 11 * number % 64] for number, text in enumerate(texts)]
    return model, prompts, stop_ids(Checkpoint(given[0]).tokenizer(), model.generation_config), 128


MODELS: dict[str, tuple[Made, int]] = {"embedded": (embedded, 192), "synthetic": (synthetic, 96)}
"""And rows that are asked, a multiple of `EVERY`."""
BATCH = 64


def generated(model: Any, prompts: Answers, stops: list[int], limit: int, batch_size: int) -> Answers:
    """By `generate`, in the order given, each answer cut behind the token that ends it."""
    import torch

    answers: Answers = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = padded(prompts[start : start + batch_size], model.device, left=0)
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


def shares(model: Any, way: Callable[[], Answers]) -> dict[str, Any]:
    """Where the loop's seconds go, how many passes there are, and how many tokens they are over."""
    seconds, passes, tokens = {"prompts": 0.0, "steps": 0.0}, {"prompts": 0, "steps": 0}, {"prompts": 0, "steps": 0}
    running, device = list[float](), model.device.type

    def before(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        running.append(clock(device))
        kind = "prompts" if module is not model and len(running) == 1 else "steps"
        if len(running) == 1:
            passes[kind] += 1
            tokens[kind] += named["input_ids"].numel()

    def after(module: Any, arguments: Any, output: Any) -> None:
        started = running.pop()
        if not running:
            seconds["steps" if module is model else "prompts"] += clock(device) - started

    modules = (model, checkpoints.decoder(model))
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules]
    handles += [module.register_forward_hook(after) for module in modules]
    try:
        total, _ = timed(way, device)
    finally:
        for handle in handles:
            handle.remove()
    return {"seconds": seconds | {"rest": total - sum(seconds.values())}, "passes": passes, "tokens": tokens}


def bare(model: Any, prompts: Answers, answers: Answers, batch_size: int) -> Answers:
    """One pass over every prompt with its answer."""
    rows = list(zip(prompts, answers, strict=True))
    per_token(lambda tokens, logits: logits.argmax(-1), rows, min(batch_size, 8), model)
    return answers


def compared(name: str, made: Made, rows: int, setting: Setting) -> list[Ratio]:
    model, prompts, stops, limit = made(rows)
    model.to(setting.device)
    answers = decoded(model, prompts, stops, limit, BATCH)
    generated(model, prompts[:2], stops, 2, 2)
    ways = {
        "file order": partial(generated, model, prompts, stops, limit, BATCH),
        "batch 1": partial(generated, model, prompts[::EVERY], stops, limit, 1),
        "sdd": partial(decoded, model, prompts, stops, limit, BATCH),
        "limit": partial(bare, model, prompts, answers, BATCH),
    }
    taken, said = in_turns(clocked(ways, setting.device), setting.turns)
    details = shares(model, ways["sdd"]) | {"prompt_tokens": sum(map(len, prompts)), "answers": list(map(len, answers))}
    found = []
    for way, goal in WAYS.items():
        every = rows // len(said[way][0])
        same = all(a == b[::every] for a, b in zip(said[way], said["sdd"], strict=True))
        seconds = [every * spent for spent in taken[way]]
        what, parity = f"rewriting, {name}, {rows} rows", "every token" if same else ""
        found.append(Ratio(what, f"`generate`, {way}", seconds, taken["sdd"], taken["limit"], parity, goal, details))
    return found


def rows(setting: Setting) -> list[Ratio]:
    models = MODELS | ({"stories": (partial(stories, setting.stories), 132)} if setting.stories else {})
    return [row for name, (made, asked) in models.items() for row in compared(name, made, asked, setting)]


def quick() -> float:
    """Seconds of bare passes over those of the loop."""
    model, prompts, stops, limit = embedded(24)
    answers = decoded(model, prompts, stops, limit, 16)
    return share(partial(bare, model, prompts, answers, 16), partial(decoded, model, prompts, stops, limit, 16))
