"""Who generates: an engine turns chat prompts into completions. `HFEngine` runs a checkpoint in this process.

A server (`sdd.rewriting.server`) is behind the same interface: requests carry text, never token ids, and every request
has an id of its own that its randomness is a function of. Greedy by default. Sampling draws by the Gumbel-max trick
(argmax of the temperature-scaled logits plus Gumbel noise is an exact sample), the noise being a function of (seed,
request id, try), so that a row's sample does not depend on its batch. Knows nothing of what the text is for.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sdd.forward import ranks
from sdd.forward.batches import length_batches, padded
from sdd.forward.decoding import Choose, Ending, decode, keeps_all, most_likely
from sdd.forward.memory import Halving
from sdd.models.chats import Turns, chat_prompt_ids, stop_ids
from sdd.models.checkpoints import Checkpoint
from sdd.models.panics import panics_told
from sdd.models.served import Server
from sdd.models.spread import Spread

CHUNK_ROWS, CHUNK_BATCHES = 128, 4
"""Rows of one chunk of answers, or batches where that is more: what a killed run loses at most."""


def chunk_rows(batch_size: int) -> int:
    """Rows of one chunk of answers: enough to keep a batch full for most of it."""
    return max(CHUNK_ROWS, CHUNK_BATCHES * batch_size)


@dataclass(frozen=True)
class Request:
    """A task to be answered, after the turns `before` it."""

    id: str
    prompt: str
    attempt: int = 0
    before: Turns = ()


@dataclass(frozen=True)
class Completion:
    """`finish`: "stop" (the model ended its turn), "length" (cut at the limit) or "too_long" (never asked).

    `tokens` are the ids that it said, the one that ended its turn among them, as far as the engine knows them.
    """

    id: str
    text: str
    finish: str
    tokens: tuple[int, ...] = field(default=(), compare=False)


def sampling(temperature: float, top_p: float, tries: int, seed: int) -> dict[str, Any]:
    """What of these counts in a key; the seed only where something is drawn."""
    if temperature == 0:
        return {"temperature": 0.0}
    return {"temperature": temperature, "top_p": top_p, "tries": tries, "seed": seed}


@dataclass(frozen=True)
class Place:
    """Where an engine computes, none of which decides the text: this machine, or the server of an engine that asks one.

    `batch_size` is how many prompts go together.
    """

    device: str | Spread = "cpu"
    batch_size: int = 32
    attention: str | None = None
    server: Server | None = None

    @property
    def at_once(self) -> int:
        """How many answers are worked on at a time."""
        return self.server.concurrency if self.server else self.batch_size


class Answering(Protocol):
    """Who answers requests, each of which may be made `tries` times."""

    tries: int

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]: ...


class Engine(Answering, Protocol):
    """What rewriting needs of an engine. `spec` is what of its settings decides the text, its `kind` among it.

    `asks_alone`: an answer does not depend on what is asked beside it, so that each is kept as it comes. `check`
    refuses what cannot work, before anything is opened.
    """

    kind: str
    asks_alone: bool

    def spec(self) -> dict[str, Any]: ...

    def check(self, place: Place) -> None: ...

    def open(self, checkpoint: Checkpoint, dtype: str, system_prompt: str | None, place: Place) -> None: ...


class HFEngine:
    """Generation by a transformers model, in a batch that stays full (`sdd.forward.decoding`).

    A model whose cache that loop does not know is left to transformers' own generation, batched by prompt length.
    """

    kind = "hf"
    asks_alone = False

    def __init__(
        self,
        max_new_tokens: int = 256,
        max_prompt_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        tries: int = 1,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        self.max_new_tokens, self.max_prompt_tokens = max_new_tokens, max_prompt_tokens
        self.temperature, self.top_p, self.tries, self.seed = temperature, top_p, tries, seed
        self.batch_size = batch_size

    def spec(self) -> dict[str, Any]:
        """Part of the rewrites' key."""
        limits = {"max_new_tokens": self.max_new_tokens, "max_prompt_tokens": self.max_prompt_tokens}
        return {"kind": self.kind, **limits, **sampling(self.temperature, self.top_p, self.tries, self.seed)}

    def check(self, place: Place) -> None:
        """Nothing: the checkpoint has been looked at."""

    def open(self, checkpoint: Checkpoint, dtype: str, system_prompt: str | None, place: Place) -> None:
        model = checkpoint.model(dtype, place.device, place.attention)
        self.take(model, checkpoint.tokenizer(), system_prompt, place.batch_size)

    def take(self, model: Any, tokenizer: Any, system_prompt: str | None, batch_size: int) -> None:
        """Use a model that is open already."""
        self.model, self.tokenizer, self.system_prompt = model, tokenizer, system_prompt
        self.batch_size = self.batch_size or batch_size

    @property
    def longest_prompt(self) -> int:
        """Tokens of a prompt that is still answered."""
        return self.max_prompt_tokens

    @property
    def stops(self) -> list[int]:
        """Ids that end an answer."""
        return stop_ids(self.tokenizer, self.model.generation_config)

    def complete(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Completions in an order of the engine's choosing; match them by id."""
        rows = [chat_prompt_ids(self.tokenizer, one.prompt, self.system_prompt, one.before) for one in requests]
        for request, row in zip(requests, rows, strict=True):
            if len(row) > self.longest_prompt:
                yield Completion(request.id, "", "too_long")
        fitting = [index for index, row in enumerate(rows) if len(row) <= self.longest_prompt]
        if not fitting:
            return
        requests, rows = [requests[index] for index in fitting], [rows[index] for index in fitting]
        stops = self.stops
        for index, tokens in self._answers(requests, rows, stops):
            end = next((at for at, token in enumerate(tokens) if token in stops), None)
            with panics_told("the tokenizer gives up on an answer"):
                text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
            said = tokens if end is None else tokens[: end + 1]
            yield Completion(requests[index].id, text, "length" if end is None else "stop", tuple(said))

    def _answers(
        self, requests: Sequence[Request], rows: Sequence[list[int]], stops: list[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """(index of a request, its new tokens); what stands behind a token of `stops` is not looked at."""
        return (self._decoded if keeps_all(self.model) else self._generated)(requests, rows, stops)

    def continued(
        self, rows: Sequence[list[int]], names: Sequence[str], ending: Ending
    ) -> Iterator[tuple[int, list[int]]]:
        """(index of a row of token ids, its new tokens), up to one that stops it or to where `ending` has it end.

        A row's draw is a function of the seed and of its name.
        """
        requests, stops = [Request(name, "") for name in names], self.stops
        if keeps_all(self.model):
            yield from self._decoded(requests, rows, stops, ending)
            return
        for index, tokens in self._generated(requests, rows, stops):
            stop = next((at + 1 for at, token in enumerate(tokens) if token in stops), len(tokens))
            yield index, tokens[: ending(tokens[:stop], stop) or stop]

    def _decoded(
        self, requests: Sequence[Request], rows: Sequence[list[int]], stops: list[int], ending: Ending | None = None
    ) -> Iterator[tuple[int, list[int]]]:
        """By this project's own loop."""
        assert self.batch_size is not None, "open() comes first"
        choose = most_likely if self.temperature == 0 else self._chooser(requests)
        yield from decode(self.model, rows, self.max_new_tokens, stops, self.batch_size, choose, ending)

    def _chooser(self, requests: Sequence[Request]) -> Choose:
        warpers, noise = self._warpers(), GumbelNoise(self.seed, requests)

        def choose(logits: Any, places: Sequence[tuple[int, int]]) -> Any:
            return noise.added(warpers(None, logits.float()), places).argmax(-1)

        return choose

    def _warpers(self) -> Any:
        from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        nucleus = [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return LogitsProcessorList([TemperatureLogitsWarper(self.temperature), *nucleus])

    def _generated(
        self, requests: Sequence[Request], rows: Sequence[list[int]], stops: list[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """The same by stock code; behind a row's end comes padding."""
        generated = self._in_batches(requests, rows, stops)
        yield from ranks.merged(dict(generated)).items() if ranks.is_rank() else generated

    def _in_batches(
        self, requests: Sequence[Request], rows: Sequence[list[int]], stops: list[int]
    ) -> Iterator[tuple[int, list[int]]]:
        """In batches by length, each rank its own."""
        import torch
        from transformers import LogitsProcessorList

        assert self.batch_size is not None, "open() comes first"
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id

        def generated(batch: Sequence[int]) -> list[list[int]]:
            ids, mask = padded([rows[index] for index in batch], self.model.device, left=pad)
            processors = LogitsProcessorList()
            if self.temperature > 0:
                noise = GumbelNoise(self.seed, [requests[index] for index in batch])
                processors = LogitsProcessorList([*self._warpers(), noise])
            with torch.no_grad():
                output = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=False,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=pad,
                    eos_token_id=stops,
                    logits_processor=processors,
                )
            return output[:, ids.shape[1] :].tolist()  # type: ignore[no-any-return]

        halving = Halving("prompts", lambda batch: len(batch) * len(rows[batch[0]]))
        for batch in ranks.own(length_batches([len(row) for row in rows], self.batch_size, max_tokens=1 << 30)):
            for some, answers in halving(generated, batch):
                yield from zip(some, answers, strict=True)


def seed_of(seed: int, request: Request) -> int:
    """A seed of 31 bits for one try of one request, for whoever draws elsewhere."""
    drawn = hashlib.sha256(f"{seed} {request.attempt} {request.id}".encode()).digest()
    return int.from_bytes(drawn[:4], "big") >> 1


class GumbelNoise:
    """Adds Gumbel noise to the logits of each row: (B, T), (B, V) -> (B, V), float64, on the logits' device.

    The noise of a token is a function of (seed, request, try, step, token) and of nothing else: the 64-bit mixer of
    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") turns that counter into a
    uniform number of 53 bits. `added` is told rows and steps; called as transformers calls it, one object serves one
    call of `generate`.
    """

    def __init__(self, seed: int, requests: Sequence[Request]) -> None:
        texts = [f"{seed} {request.attempt} {request.id}" for request in requests]
        self.keys = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
        self.step = 0

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step, self.step = self.step, self.step + 1
        return self.added(scores, [(row, step) for row in range(len(self.keys))])

    def added(self, scores: Any, places: Sequence[tuple[int, int]]) -> Any:
        """The same for chosen places, each (index of a request, step)."""
        import torch

        device, width = scores.device, scores.shape[-1]
        mixed = [_signed(_mixed(self.keys[row] + step * _GOLDEN)) for row, step in places]
        keys = torch.tensor(mixed, device=device)[:, None]
        tokens = torch.arange(1, width + 1, device=device).mul_(_signed(_GOLDEN))
        noise = torch.empty(scores.shape, dtype=torch.float64, device=device)
        piece = _PIECE if device.type == "cpu" else noise.numel()
        rows = max(1, piece // width)
        for some_keys, some_rows in zip(keys.split(rows), noise.split(rows), strict=True):
            for some_tokens, numbers in zip(tokens.split(piece), some_rows.split(piece, dim=1), strict=True):
                _fill_uniform(numbers, some_keys + some_tokens)
        return torch.sub(scores, noise.log_().neg_().log_(), out=noise)


_GOLDEN = 0x9E3779B97F4A7C15
_PIECE = 1 << 15
"""Numbers that an operation on a CPU takes at once: so many stay in its cache and are not split among threads, whose
start and end would take longer on a busy machine (benchmarks/sampling.py)."""
_BELOW_ONE = 1 - 2.0**-53
"""The largest of the numbers, which would be rounded up to 1: its noise would be infinite."""
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mixed(value: int) -> int:
    value &= (1 << 64) - 1
    for shift, factor in _ROUNDS:
        value = (value ^ value >> shift) * factor & (1 << 64) - 1
    return value ^ value >> 31


def _signed(value: int) -> int:
    """The 64 bits as torch holds them; its products wrap as those of unsigned numbers do."""
    return value - (1 << 64) if value >> 63 else value


def _fill_uniform(numbers: Any, bits: Any) -> None:
    """Numbers in (0, 1) from counters of 64 bits, which are used up; of one shape."""
    import torch

    spare = torch.empty_like(bits)

    def xor_shifted(shift: int) -> Any:
        """bits ^= bits >>> shift; torch's shift repeats the sign."""
        torch.bitwise_right_shift(bits, shift, out=spare)
        return bits.bitwise_xor_(spare.bitwise_and_((1 << 64 - shift) - 1))

    for shift, factor in _ROUNDS:
        xor_shifted(shift).mul_(_signed(factor))
    xor_shifted(31).bitwise_and_((1 << 53) - 1)
    numbers.copy_(bits).add_(0.5).mul_(2.0**-53).clamp_(max=_BELOW_ONE)
