"""Scores of blocks side by side with a loop over sizes, as PruneMe has it, and with one bare pass.

    python -m benchmarks scores

The loop (github.com/arcee-ai/PruneMe, written afresh) runs the model once for every size on padded batches in file
order, keeps all hidden states and computes all logits. Here one pass gives every size. Seconds are the processor's
on one thread, or a GPU's. The angular distances of both are compared; the limit is a pass of the blocks alone over the
same batches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.models import random_llama, writer_of_stories
from benchmarks.rows import Ratio, Setting
from benchmarks.timing import clocked, in_turns, share
from sdd.forward.batches import length_batches, padded, show_texts
from sdd.importance.states import Angular, angular_distance
from sdd.models import checkpoints

BATCH = 8
SIZES = range(1, 11)


def draw_texts(texts: int, longest: int) -> list[list[int]]:
    """Random tokens, lengths spread evenly from a fourth of the longest."""
    import torch

    generator = torch.Generator().manual_seed(2)
    lengths = torch.linspace(longest // 4, longest, texts).round().int()
    lengths = lengths[torch.randperm(texts, generator=generator)].tolist()
    return [torch.randint(3, 32_000, (length,), generator=generator).tolist() for length in lengths]


def looped(model: Any, rows: list[list[int]], sizes: range) -> dict[int, list[float]]:
    """Mean distance by size and start, one run over the texts for each size."""
    import torch

    found = {}
    for size in sizes:
        total = 0.0
        for start in range(0, len(rows), BATCH):
            ids, mask = padded(rows[start : start + BATCH], model.device, left=0)
            with torch.no_grad():
                states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            last = torch.stack([state[:, -1] for state in states[:-1]])
            total = total + angular_distance(last[:-size], last[size:]).sum(1)
        found[size] = (total / len(rows)).tolist()
    return found


def scored(model: Any, rows: list[list[int]]) -> dict[str, list[float]]:
    criterion = Angular()
    criterion.start(len(checkpoints.blocks(model)))
    show_texts(model, criterion, rows, BATCH)
    distances: dict[str, list[float]] = criterion.scores()["distance"]
    return distances


def bare(model: Any, rows: list[list[int]]) -> None:
    import torch

    with torch.no_grad():
        for batch in length_batches([len(row) for row in rows], BATCH, 16_384):
            ids, mask = padded([rows[index] for index in batch], model.device)
            checkpoints.decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False)


def apart(loop: dict[int, list[float]], own: dict[str, list[float]]) -> float:
    """The largest difference; the loop's last state is normed, so that spans up to the end are left out."""
    return max(abs(a - b) for size, values in loop.items() for a, b in zip(values, own[str(size)], strict=False))


def compared(name: str, model: Any, texts: list[list[int]], sizes: range, setting: Setting) -> Ratio:
    ways: dict[str, Callable[[], Any]] = {
        "loop": partial(looped, model, texts, sizes),
        "sdd": partial(scored, model, texts),
        "limit": partial(bare, model, texts),
    }
    taken, results = in_turns(clocked(ways, setting.device), setting.turns)
    distance = max(map(apart, results["loop"], results["sdd"]))
    parity = f"{distance:.0e} apart" if distance < 1e-5 else ""
    return Ratio(f"scores, {name}", "a loop over sizes", taken["loop"], taken["sdd"], taken["limit"], parity)


def rows(setting: Setting) -> list[Ratio]:
    model, texts = drawn_model().to(setting.device), draw_texts(16, 256)
    bare(model, texts[:BATCH])
    asked = {"one size": range(1, 2), "ten sizes": SIZES}
    found = [compared(name, model, texts, sizes, setting) for name, sizes in asked.items()]
    if setting.stories:
        model, texts = writer_of_stories(setting.stories, 128, 256)
        found.append(compared("stories, four sizes", model.to(setting.device), texts, range(1, 5), setting))
    return found


def drawn_model() -> Any:
    return random_llama(initializer_range=0.2)


def quick() -> float:
    """Seconds of one bare pass over those of scoring."""
    model, rows = drawn_model(), draw_texts(4, 96)
    bare(model, rows)
    return share(lambda: bare(model, rows), lambda: scored(model, rows))
