"""A live model with blocks passed over, and how likely it finds rows.

A block that is passed over keeps its place: stock decoders choose masks and position codings by a block's number, so
that the rest computes what the pruned checkpoint will. Nothing is loaded or copied. Knows nothing of criteria.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdd.models import checkpoints
from sdd.models.chats import Turns, training_ids

if TYPE_CHECKING:
    from torch import Tensor

LOGITS = 2**26
"""Logits held at a time."""


@dataclass(frozen=True)
class Row:
    """Token ids of which ids[first:] are scored; `answer` is the range of those that have to be right, default all."""

    ids: list[int]
    first: int = 1
    answer: tuple[int, int] | None = None


def task_row(
    tokenizer: Any, prompt: str, reference: str, answer: str | None, system_prompt: str | None, before: Turns = ()
) -> Row:
    """The chat of a task and its reference, which is scored; the final answer is where it last stands in there.

    A reference in which the answer does not stand has to be right as a whole, up to the end of the turn.
    """
    ids, first = training_ids(tokenizer, prompt, reference, system_prompt, before)

    def holds(start: int, end: int) -> bool:
        return bool(answer) and answer in tokenizer.decode(ids[start:end])

    end = len(ids)
    start = next((at for at in range(end - 1, first - 1, -1) if holds(at, end)), None)
    if start is None:
        return Row(ids, first)
    return Row(ids, first, (start, next(at for at in range(start + 1, end + 1) if holds(start, at))))


@contextmanager
def forwards(layers: Any, functions: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
    """While open, the forward of each block named is another function; its hooks and attributes stay.

    A block of a model that is spread over devices has a forward of its own, which brings its inputs to it.
    """
    own = {block: vars(layers[block]).get("forward") for block in functions}
    try:
        for block, function in functions.items():
            assert own[block] is None or hasattr(layers[block], "_hf_hook"), f"block {block} is replaced already"
            layers[block].forward = function
        yield
    finally:
        for block in functions:
            vars(layers[block]).pop("forward", None)
            if own[block] is not None:
                layers[block].forward = own[block]


class Bypass:
    """Pass over blocks of a model, and catch the states that enter them."""

    def __init__(self, model: Any) -> None:
        import torch

        self.layers = checkpoints.blocks(model)
        kinds: list[bool] = []
        handle = self.layers[0].register_forward_hook(lambda _, arguments, out: kinds.append(isinstance(out, tuple)))
        try:
            with torch.no_grad():
                checkpoints.decoder(model)(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
        finally:
            handle.remove()
        self.in_tuples = kinds[0]

    @contextmanager
    def letting_through(self, states: Mapping[int, Tensor | None]) -> Iterator[None]:
        """While open, each block named gives the state it is named with, or with None, the one that enters it."""

        def function(state: Tensor | None) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                entering = arguments[0] if arguments else keywords["hidden_states"]
                leaving = entering if state is None else state
                return (leaving,) if self.in_tuples else leaving

            return forward

        with forwards(self.layers, {block: function(state) for block, state in states.items()}):
            yield

    @contextmanager
    def catching(self, blocks: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """A table that is filled with the state entering each block named as the model runs."""
        states: dict[int, Tensor] = {}

        def hook(block: int) -> Any:
            def before(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                states[block] = arguments[0] if arguments else keywords["hidden_states"]

            return before

        handles = [self.layers[b].register_forward_pre_hook(hook(b), with_kwargs=True) for b in blocks]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


def likelihoods(model: Any, hidden: Tensor, rows: Sequence[Row]) -> tuple[float, int, int, int]:
    """(nats of the scored tokens, their number, rows whose answer is right, rows) from final states (B, T, D).

    Logits are made at scored tokens only, some at a time.
    """
    import torch

    from sdd.forward.losses import target_loss_sum

    device = hidden.device
    places = [(at, t) for at, row in enumerate(rows) for t in range(row.first, len(row.ids))]
    row_at, token_at = torch.tensor(places, device=device).T
    targets = torch.tensor([rows[at].ids[t] for at, t in places], device=device)
    spans = [row.answer or (row.first, len(row.ids)) for row in rows]
    in_answer = torch.tensor([spans[at][0] <= t < spans[at][1] for at, t in places], device=device)
    nats, missed = 0.0, torch.zeros(len(rows), dtype=torch.long, device=device)
    step = max(1, LOGITS // model.config.vocab_size)
    for at in range(0, len(places), step):
        chunk = slice(at, at + step)
        logits = checkpoints.head_logits(model, hidden[row_at[chunk], token_at[chunk] - 1])
        nats += float(target_loss_sum(logits, targets[chunk]))
        missed.index_add_(0, row_at[chunk], ((logits.argmax(-1) != targets[chunk]) & in_answer[chunk]).long())
    return nats, len(places), int((missed == 0).sum()), len(rows)
