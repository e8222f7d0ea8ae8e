"""Continuations of many prompts by one causal LM: the batch stays full, and what a row repeats is drafted.

A row that ends leaves the batch, and the next one takes its place. Keys and values lie in tensors that are made once,
token t of a row in column t, so that no pass copies them and no row is padded on the left. What all prompts begin with
is read once. The last tokens of a row often stand in it before, since a rewrite repeats its reference, or in another
row's answer: what followed them there is drafted, and verified in the pass that says the next token (Yang et al. 2023,
arXiv 2304.04487). A drafted token is kept where the model says it too, so that the output is that of one token a pass.

Knows nothing of text, and not of caches other than one key and one value a token and block: see `keeps_all`.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

from sdd.forward import ranks
from sdd.forward.batches import length_batches, padded
from sdd.forward.memory import freed, is_short
from sdd.forward.teacher_forcing import MAX_TOKENS
from sdd.models import checkpoints

PROMPT_TOKENS = 1024
"""Padded tokens of a pass over prompts on a CPU, whose cache they are to stay in."""
REFILL = 8
"""The batch is refilled when one in so many places is free: a pass over few prompts takes as long as over several."""
NGRAM = 2
"""Last tokens that are looked up in what stands before them."""
DRAFT, DRAFT_PASS = 5, 16
"""Tokens drafted at most for a row, and of a pass with drafts at most: a larger pass takes longer with every token."""
SMALL, PAYS = 2**25, 0.4
"""Tokens of a pass times parameters of a block up to which calls and cache count for as much as products do; there one
token is drafted for every row while so large a share of them is guessed right."""
SAID = 2**18
"""N-grams of answers that are known at most: some 40 MB."""

Choose = Callable[[Any, Sequence[tuple[int, int]]], Any]
"""(N, V) logits, and (index of the prompt, number of the token) of each -> (N,) token ids."""
Ending = Callable[[list[int], int], int | None]
"""A row's new tokens, and how many of them are of this pass -> how many it ends with, or None if it goes on."""


def keeps_all(model: Any) -> bool:
    """Whether `decode` serves: a plain cache, a mask that is looked at, and positions that are no matter of the batch.

    Sliding windows, recurrent states, ALiBi and rotary frequencies that follow the longest row are left to stock code.
    """
    import inspect

    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    ropes = {str(getattr(module, "rope_type", None)) for module in model.modules()}
    return (
        all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
        and model.config._attn_implementation in ("eager", "sdpa")
        and getattr(model, "_supports_attention_backend", False)
        and "position_ids" in inspect.signature(model.forward).parameters
        and ropes.isdisjoint(("dynamic", "longrope"))
    )


def most_likely(logits: Any, places: Sequence[tuple[int, int]]) -> Any:
    return logits.argmax(-1)


def decode(
    model: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stops: Collection[int],
    batch_size: int,
    choose: Choose = most_likely,
    ending: Ending | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(index of a prompt, its new tokens), as the rows end: with a token of `stops`, by `ending`, or at the limit.

    Of several ranks, each answers its share of the prompts, and all have all answers after the last one. Where memory
    does not last, the batch is halved, and its rows go on from the tokens they have.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    answers = _decoded(model, prompts, ranks.own(order), max_new_tokens, frozenset(stops), batch_size, choose, ending)
    yield from ranks.merged(dict(answers)).items() if ranks.is_rank() else answers


def _decoded(
    model: Any,
    prompts: Sequence[list[int]],
    order: Sequence[int],
    max_new_tokens: int,
    stops: Collection[int],
    batch_size: int,
    choose: Choose,
    ending: Ending | None,
) -> Iterator[tuple[int, list[int]]]:
    """The same for the prompts that are named, in that order."""
    if not order:
        return
    waiting = deque(order)
    begun: dict[int, _Row] = {}
    places, columns, shared = batch_size, len(prompts[order[0]]) + max_new_tokens, _shared(prompts)
    said: dict[tuple[int, ...], int] = {}
    small, guessed = SMALL // _block_parameters(model), PAYS
    batch: _Batch | None = None
    rows: list[_Row] = []
    while waiting or rows:
        choices: list[list[int]] = []
        try:
            if batch is None:
                batch = _Batch(model, min(places, len(order)), columns, shared)
                batch.read(0, [row.tokens for row in rows])
            free = places - len(rows)
            if waiting and free >= min(max(1, places // REFILL), len(waiting)):
                taken = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                new = _sorted(
                    begun.pop(index) if index in begun else _Row(index, prompts[index], said) for index in taken
                )
                rows += new
                batch.read(len(rows) - len(new), [row.tokens for row in new])
            one = 2 * len(rows) <= small and guessed >= PAYS
            most = min(DRAFT, max(DRAFT_PASS // len(rows) - 1, int(one)))
            for row in rows:
                row.draft(min(most, max_new_tokens - row.new - 1))
            choices = batch.step(rows, choose)
        except (RuntimeError, MemoryError) as error:
            if (len(rows) or min(places, len(order))) == 1 or not is_short(error):
                raise
        if not choices or batch is None:  # half of the rows go on from what they have, the others wait with theirs
            batch, together = None, len(rows) or min(places, len(order))
            places = (together + 1) // 2
            freed("answers", together, places)
            rows = _sorted(rows)
            begun |= {row.index: row for row in rows[places:]}
            waiting.extendleft(row.index for row in reversed(rows[places:]))
            rows = rows[:places]
            continue
        right = sum(row.guess == chosen[0] for row, chosen in zip(rows, choices, strict=True)) / len(rows)
        guessed += (right - guessed) / 8
        ended = [row.take(chosen, max_new_tokens, stops, ending) for row, chosen in zip(rows, choices, strict=True)]
        if any(ended):
            finished = [row for row, end in zip(rows, ended, strict=True) if end]
            rows = batch.leave(rows, ended)
            yield from ((row.index, row.answer) for row in finished)


def _sorted(rows: "Iterable[_Row]") -> "list[_Row]":
    """The longest first, as they are read."""
    return sorted(rows, key=lambda row: -len(row.tokens))


def _shared(prompts: Sequence[list[int]]) -> list[int]:
    """What all prompts begin with, short of the last token of any."""
    first, last = min(prompts), max(prompts)
    most = min(map(len, prompts)) - 1
    return first[: next((at for at in range(most) if first[at] != last[at]), most)]


def _block_parameters(model: Any) -> int:
    """The model's parameters, a block."""
    parameters = sum(int(parameter.numel()) for parameter in model.parameters())
    return max(1, parameters // len(checkpoints.blocks(model)))


@dataclass
class _Row:
    """One prompt and what the model says to it; `after` holds what last followed an n-gram, `said` in any answer."""

    index: int
    prompt: list[int]
    said: dict[tuple[int, ...], int]
    tokens: list[int] = field(init=False, default_factory=list)
    drafted: list[int] = field(init=False, default_factory=list)
    guess: int | None = field(init=False, default=None)
    after: dict[tuple[int, ...], int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.after = dict(self._followed(NGRAM))

    @property
    def new(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def answer(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def shown(self) -> list[int]:
        """What the next pass is over."""
        return [self.tokens[-1], *self.drafted]

    def _followed(self, start: int) -> Iterator[tuple[tuple[int, ...], int]]:
        """N-grams, and the tokens behind them from `start` on."""
        for end in range(max(start, NGRAM), len(self.tokens)):
            yield tuple(self.tokens[end - NGRAM : end]), self.tokens[end]

    def _append(self, tokens: list[int]) -> None:
        known = len(self.tokens)
        self.tokens += tokens
        followed = dict(self._followed(known))
        self.after |= followed
        if len(self.said) < SAID:
            self.said |= followed

    def draft(self, most: int) -> None:
        """The next tokens as they are guessed, of which the first is kept as `guess` even where none is drafted."""
        self.drafted, last = [], tuple(self.tokens[-NGRAM:])
        self.guess = token = self._behind(last)
        while token is not None and len(self.drafted) < most:
            self.drafted.append(token)
            last = (*last[1:], token)
            token = self._behind(last)

    def _behind(self, last: tuple[int, ...]) -> int | None:
        return self.after.get(last, self.said.get(last))

    def take(self, choices: list[int], limit: int, stops: Collection[int], ending: Ending | None) -> bool:
        """Append what stands of the choices made behind every token shown; whether the row ends."""
        right = next((at for at, token in enumerate(self.drafted) if choices[at] != token), len(self.drafted))
        taken = choices[: right + 1]
        stop = next((at for at, token in enumerate(taken) if token in stops), None)
        taken = taken if stop is None else taken[: stop + 1]
        self._append(taken)
        if ending and (end := ending(self.answer, len(taken))) is not None:
            del self.tokens[len(self.prompt) + end :]
            return True
        return stop is not None or self.new == limit


class _Batch:
    """The model, and the keys and values of the rows in its places."""

    def __init__(self, model: Any, places: int, columns: int, shared: list[int]) -> None:
        from transformers import Cache

        self.model, self.columns, self.shared = model, columns, len(shared)
        self.layers = [_layer_class()(places, columns + DRAFT) for _ in checkpoints.blocks(model)]
        self.cache = Cache(layers=self.layers)
        if shared:
            self._read(slice(0, 1), [shared], 0)
            self._copy(slice(0, 1), slice(1, None), 0, self.shared)

    def read(self, first: int, prompts: list[list[int]]) -> None:
        """All but the last token of prompts, longest first, into the places from `first` on."""
        lengths = [len(prompt) - 1 - self.shared for prompt in prompts if len(prompt) - 1 > self.shared]
        most = PROMPT_TOKENS if self.model.device.type == "cpu" else MAX_TOKENS
        for indices in length_batches(lengths, len(lengths), most):
            places = slice(first + indices[0], first + indices[-1] + 1)
            self._read(places, [prompts[index][self.shared : -1] for index in indices], self.shared)

    def _read(self, places: slice, rows: list[list[int]], start: int) -> None:
        import torch

        ids, _ = padded(rows, self.model.device)  # what is read behind a row's end is masked, then written over
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        self._place(_Columns(places, start, start + ids.shape[1]))
        with torch.inference_mode():
            body = checkpoints.decoder(self.model)
            body(input_ids=ids, position_ids=positions, past_key_values=self.cache, use_cache=True)

    def step(self, rows: list[_Row], choose: Choose) -> list[list[int]]:
        """What the model says behind the last token of every row, and behind every token drafted for it."""
        import torch

        device, shown = self.model.device, [row.shown for row in rows]
        width = max(map(len, shown))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in shown], device=device)
        last = torch.tensor([len(row.tokens) - 1 for row in rows], device=device)
        columns = last[:, None] + torch.arange(width, device=device)
        self._place(_Tokens(columns, max(len(row.tokens) for row in rows) - 1 + width))
        with torch.inference_mode():
            logits = self.model(
                input_ids=ids,
                attention_mask=self._mask(columns),
                position_ids=columns.clamp(max=self.columns - 1),
                past_key_values=self.cache,
                use_cache=True,
            ).logits.flatten(0, 1)
            places = [(at, number) for at, tokens in enumerate(shown) for number in range(len(tokens))]
            if len(places) < len(logits):
                logits = logits[[at * width + number for at, number in places]]
            choices = choose(logits, [(rows[at].index, rows[at].new + number) for at, number in places]).tolist()
        ends = list(accumulate(map(len, shown)))
        return [choices[end - len(tokens) : end] for tokens, end in zip(shown, ends, strict=True)]

    def _place(self, view: Any) -> None:
        for layer in self.layers:
            layer.view = view

    def _mask(self, columns: Any) -> Any:
        """What the tokens in these columns look at, (rows, 1, tokens, columns), as the model's attention takes it."""
        import torch

        looked_at = torch.arange(self.layers[0].view.end, device=columns.device) <= columns[:, None, :, None]
        if self.model.config._attn_implementation == "sdpa":
            return looked_at
        dtype = self.model.dtype
        return torch.zeros(looked_at.shape, dtype=dtype, device=columns.device).masked_fill_(
            ~looked_at, torch.finfo(dtype).min
        )

    def leave(self, rows: list[_Row], ended: list[bool]) -> list[_Row]:
        """The rows that stay, moved together."""
        count = len(rows) - sum(ended)
        free = [at for at in range(count) if ended[at]]
        moved = [at for at in range(count, len(rows)) if not ended[at]]
        kept = rows[:count]
        for place, at in zip(free, moved, strict=True):
            kept[place] = rows[at]
            self._copy(at, place, self.shared, len(rows[at].tokens))
        return kept

    def _copy(self, source: Any, target: Any, start: int, end: int) -> None:
        """Columns of one place, or of several, into others."""
        import torch

        with torch.inference_mode():
            for store in (store for layer in self.layers for store in (layer.keys, layer.values)):
                store[target, :, start:end] = store[source, :, start:end]


@dataclass(frozen=True)
class _Columns:
    """Where a pass over prompts writes: one range of columns, in one range of places."""

    places: slice
    start: int
    end: int

    def put(self, store: Any, states: Any) -> Any:
        store[self.places, :, self.start : self.end] = states
        return store[self.places, :, : self.end]


class _Tokens:
    """Where a pass over the rows' next tokens writes: each row in columns of its own."""

    start = 0

    def __init__(self, columns: Any, end: int) -> None:
        self.columns, self.end = columns, end
        self.targets: dict[int, Any] = {}

    def put(self, store: Any, states: Any) -> Any:
        heads = states.shape[1]
        if heads not in self.targets:
            self.targets[heads] = self._rows(heads, store.shape[2])
        store.flatten(0, 2).index_copy_(0, self.targets[heads].to(store.device), states.flatten(0, 2))
        return store[: len(self.columns), :, : self.end]

    def _rows(self, heads: int, columns: int) -> Any:
        """Where (rows, heads, tokens) lie among (places, heads, columns), all as one axis."""
        import torch

        first = torch.arange(len(self.columns) * heads, device=self.columns.device) * columns
        return (first.view(-1, heads, 1) + self.columns[:, None]).flatten()


@cache
def _layer_class() -> Any:
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):
        """Keys and values of one block, (places, heads, columns, width) each, made at its first pass."""

        def __init__(self, places: int, columns: int) -> None:
            super().__init__()
            self.size, self.view = (places, columns), _Columns(slice(0, 1), 0, 0)

        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            if not self.is_initialized:  # type: ignore[has-type]
                places, columns = self.size
                self.keys, self.values = (t.new_zeros(places, t.shape[1], columns, t.shape[3]) for t in (keys, values))
                self.is_initialized = True
            return self.view.put(self.keys, keys), self.view.put(self.values, values)

        def get_seq_length(self) -> int:
            return self.view.start

    return Layer
