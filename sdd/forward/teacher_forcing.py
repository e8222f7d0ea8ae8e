"""Teacher forcing: what a model says at every token of an answer that is given to it, in one pass an answer.

The state at the token before an answer's i-th token is the one that predicts it. Logits are made of a few states at a
time, so that a large vocabulary costs no memory. Knows nothing of whose answers they are.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from sdd.forward import ranks
from sdd.forward.batches import length_batches, padded
from sdd.forward.memory import Halving
from sdd.forward.parts import Parts
from sdd.models import checkpoints

MAX_TOKENS = 16_384
"""Padded tokens of one pass."""
CHUNK = 512
"""States whose logits are made at a time."""

Row = tuple[list[int], list[int]]
"""Token ids of a prompt and of the answer to it."""


def answer_states(
    model: Any, rows: Sequence[Row], batch_size: int, known: Container[int] = ()
) -> Iterator[tuple[int, Any]]:
    """(index of a row, states (N, hidden) that predict its N answer tokens), batched by length, longest first.

    Two models that are shown the same rows yield them in the same order. Of several ranks, each has its own batches. A
    batch of which all rows are `known` is left out; one that memory does not last for is passed in halves.
    """
    import torch

    body, device = checkpoints.decoder(model), model.device
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]

    def passed(batch: Sequence[int]) -> Any:
        ids, mask = padded([[*rows[index][0], *rows[index][1]] for index in batch], device)
        with torch.no_grad():
            return body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    halving = Halving("given answers", lambda batch: len(batch) * lengths[batch[0]])
    for batch in ranks.own(length_batches(lengths, batch_size, MAX_TOKENS)):
        if all(index in known for index in batch):
            continue
        for some, states in halving(passed, batch):
            for at, index in enumerate(some):
                yield index, states[at, len(rows[index][0]) - 1 : lengths[index] - 1]
            del states


def per_token(
    function: Callable[..., Any],
    rows: Sequence[Row],
    batch_size: int,
    *students: Any,
    of_row: Callable[..., Any] = list,
    kept: Path | None = None,
) -> list[Any]:
    """For every row, what `of_row` makes of the values that `function(tokens, logits of each model ...)` gives its
    answer's tokens: by default a list of them.

    `function` takes (N,) token ids and for every model (N, V) float32 logits, and returns (N,) values. In files named
    after `kept` (see `Parts`) rows are kept, and taken from there.
    """
    import torch

    with Parts(kept, kept and [batch_size, [len(prompt) + len(answer) for prompt, answer in rows]]) as parts:
        made: dict[int, Any] = dict(parts.known())
        for shown in zip(*(answer_states(model, rows, batch_size, frozenset(made)) for model in students), strict=True):
            index = shown[0][0]
            assert all(other == index for other, _ in shown), "both models are shown the same row"
            tokens, values = torch.tensor(rows[index][1], device=shown[0][1].device), []
            for start in range(0, len(tokens), CHUNK):
                chunk = slice(start, start + CHUNK)
                with torch.no_grad():
                    logits = [
                        checkpoints.head_logits(model, states[chunk]).float()
                        for model, (_, states) in zip(students, shown, strict=True)
                    ]
                    values += [float(value) for value in function(tokens[chunk], *logits).tolist()]
            made[index] = of_row(values)
            parts.add(lambda index=index: [index, made[index]])  # type: ignore[misc]
    whole = ranks.merged(made) if ranks.is_rank() else made
    return [whole[index] for index in range(len(rows))]
