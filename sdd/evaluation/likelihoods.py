"""Likelihoods of continuations as lm-eval's HFLM defines them, each token computed once.

HFLM passes a context again for every choice, and takes logits of the whole row. Here the rows make a tree of common
prefixes (`prefixes`), which is walked depth first: a node's keys and values are kept while the nodes after it are
computed, and logits are taken where a target is predicted. Rows of a batch agree in what lies before them and are
padded at their ends alone, so no mask and no position is given: any causal model will do whose cache keeps every token.
For others HFLM's own way stands. What is tokenized, cut and summed, and in which precision, is HFLM's.
"""

import copy
import inspect
import logging
from array import array
from collections.abc import Callable, Mapping
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdd.evaluation.prefixes import Node, prefix_tree
from sdd.forward import ranks
from sdd.forward.batches import padded
from sdd.forward.memory import freed, is_short
from sdd.forward.parts import Parts

MOST_TOKENS = 2048
"""Tokens of a pass, unless one row has more; more in a pass make none faster."""
MOST_PADDING = 64
"""Tokens of padding in a pass: to begin another one takes about as long."""
SUBTREES = 4
"""So many for each rank are shared out whole; where there are fewer, what is below them is."""
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Kinds of rotary frequencies that change with a row's length, and with them the keys of its beginning."""


def keeps_prefixes(model: Any, longest: int) -> bool:
    """Whether rows of up to `longest` tokens can go on from what the model's cache keeps of their beginning.

    So it is where every layer keeps the keys and values of every token: full attention, or a window that none of the
    rows fills; and where a key does not depend on what comes after it.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if not {"past_key_values", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys():
        return False
    rotary = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    if any(kind in LENGTH_DEPENDENT for kind in _rotary_kinds(rotary or {})):
        return False
    return all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and longest < layer.sliding_window)
        for layer in DynamicCache(config=model.config).layers
    )


def _rotary_kinds(parameters: Mapping[str, Any]) -> list[Any]:
    """Kinds of rotary frequencies in a config's settings, which some architectures give per kind of layer."""
    own = [parameters["rope_type"]] if "rope_type" in parameters else []
    return own + [kind for value in parameters.values() if isinstance(value, Mapping) for kind in _rotary_kinds(value)]


class SharedPrefixes:
    """Goes before `HFLM` among the bases of a class. `batch_size` is the number of the longest rows that may be in
    memory at once; of shorter ones there are more."""

    kept: Path | None = None
    """What files are named after in which likelihoods outlast a kill."""

    def _loglikelihood_tokens(
        self: Any, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """As HFLM's: a (log-likelihood, whether greedy decoding gives it) per (strings, context, continuation)."""
        wholes = [tuple(context + continuation[:-1]) for _, context, continuation in requests]
        rows = [whole[-self.max_length :] for whole in wholes]
        longest = max(map(len, rows), default=0)
        if not rows or self.backend != "causal" or not keeps_prefixes(self.model, longest):
            own = ranks.own(list(enumerate(requests)))
            inherited: list[tuple[float, bool]] = super()._loglikelihood_tokens(  # type: ignore[misc]
                [request for _, request in own], disable_tqdm=disable_tqdm, override_bs=override_bs
            )
            whole = ranks.merged({index: answer for (index, _), answer in zip(own, inherited, strict=True)})
            return [(value, as_greedy) for value, as_greedy in (whole[index] for index in range(len(requests)))]
        for _, context, continuation in requests:
            assert context, "a context has at least one token"
            assert len(continuation) <= self.max_length, f"{len(continuation)} tokens of a continuation"
        measured = {whole for whole, (_, _, continuation) in zip(wholes, requests, strict=True) if continuation}
        assert measured == set(wholes), "a continuation without tokens, after a context that has no other"
        _warn_of_cuts(measured, self.max_length)
        continuations = [continuation for _, _, continuation in requests]
        lengths = [len(continuation) for continuation in continuations]
        capacity = (override_bs or self.batch_size) * longest
        asked = self.kept and [capacity, lengths, _digest(rows)]
        with (
            tqdm(total=sum(lengths), desc="likelihoods", unit="token", disable=disable_tqdm) as progress,
            Parts(self.kept, asked) as parts,
        ):
            targets = [token for tokens in continuations for token in tokens]
            walk = _Walk(self.model, targets, self.softmax_dtype, parts)
            values, greedy = walk.run(prefix_tree(rows, lengths), capacity, progress)
        answers = [
            (float(of_tokens.sum()), bool(as_greedy.all()))
            for of_tokens, as_greedy in zip(values.split(lengths), greedy.split(lengths), strict=True)
        ]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers


def _digest(rows: list[tuple[int, ...]]) -> str:
    digest = blake2b(digest_size=16)
    for row in rows:
        digest.update(array("i", row).tobytes())
    return digest.hexdigest()


def _warn_of_cuts(rows: set[tuple[int, ...]], max_length: int) -> None:
    """What HFLM says, once a row, in its name."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    for row in rows:
        if len(row) > max_length:
            logger.warning("Truncating %d tokens from the left of %d", len(row) - max_length, len(row))


class _Walk:
    """One walk through a tree: the log-likelihood of every target, and whether it is the most likely token.

    Several ranks share its passes: where there are enough subtrees, each takes its own of them; what is above them, all
    compute. What is known of all of a batch, and of what is after it, is taken from `parts` and not computed again.
    """

    def __init__(self, model: Any, targets: list[int], softmax_dtype: Any, parts: Parts) -> None:
        import torch

        self.model, self.softmax_dtype, self.parts = model, softmax_dtype, parts
        self.targets = torch.tensor(targets, device=model.device)
        self._measured: list[tuple[Any, Any, Any]] = []
        self.dtype = softmax_dtype or model.dtype
        self._known = {number: pair for part in parts.known() for number, *pair in zip(*part, strict=True)}

    def run(self, roots: list[Node], capacity: int, progress: Any) -> tuple[Any, Any]:
        """Values and whether greedy, (N,) each, on the CPU; at most `capacity` tokens are kept at a level of the tree,
        unless one row has more."""
        import torch

        self.capacity, self.progress = capacity, progress
        with torch.no_grad():
            self._visit([(0, node) for node in roots], None, ranks.is_rank())
        if not ranks.is_rank():
            order, values, greedy = (torch.cat(parts).cpu() for parts in zip(*self._measured, strict=True))
            places = order.argsort()
            return values[places], greedy[places]
        own = (part for parts in self._measured for part in zip(*(one.tolist() for one in parts), strict=True))
        whole = ranks.merged({number: pair for number, *pair in own})
        pairs = [whole[number] for number in range(len(whole))]
        return torch.tensor([value for value, _ in pairs], dtype=self.dtype), torch.tensor([one for _, one in pairs])

    def _visit(self, nodes: list[tuple[int, Node]], cache: Any, split: bool) -> None:
        """Nodes with the rows of `cache` that they go on from; those with others after them in batches of a length.

        `split`: the ranks are still to part ways.
        """
        inner: dict[int, list[tuple[int, Node]]] = {}
        for row, node in nodes:
            inner.setdefault(len(node.tokens) if node.children else 0, []).append((row, node))
        leaves = inner.pop(0, [])
        subtrees = [batch for alike in inner.values() for batch in self._batches(alike)]
        here = split and len(subtrees) >= SUBTREES * ranks.number()
        for batch in ranks.own(subtrees) if here else subtrees:
            if not self._is_known(batch):
                self._in_halves(partial(self._subtrees, cache, split and not here), batch, split and not here)
        for batch in ranks.own(self._batches(leaves)) if split else self._batches(leaves):
            if not self._is_known(batch):
                self._in_halves(partial(self._pass, cache, False), batch)

    def _is_known(self, batch: list[tuple[int, Node]]) -> bool:
        """Whether all that is scored in nodes and after them is known; then it is measured."""
        import torch

        numbers, nodes = list[int](), [node for _, node in batch] if self._known else []
        while nodes:
            node = nodes.pop()
            numbers += [number for _, number in node.scored]
            nodes += node.children
        if not numbers or not all(number in self._known for number in numbers):
            return False
        values, greedy = zip(*(self._known[number] for number in numbers), strict=True)
        device = self.targets.device
        told = torch.tensor(numbers, device=device), torch.tensor(values, dtype=self.dtype, device=device)
        self._measured.append((*told, torch.tensor(greedy, device=device)))
        self.progress.total -= len(numbers)
        return True

    def _subtrees(self, cache: Any, split: bool, batch: list[tuple[int, Node]]) -> None:
        """Nodes of one start, and all that is after them."""
        grown = self._pass(cache, True, batch)
        below = [(row, child) for row, (_, node) in enumerate(batch) for child in node.children]
        self._visit(below, grown, split)

    def _in_halves(self, work: Callable[[list[tuple[int, Node]]], Any], batch: Any, whole: bool = False) -> None:
        """Have a batch computed, in halves where memory does not last; not where all ranks are to compute the same."""
        waiting = [batch]
        while waiting:
            some, measured = waiting.pop(), len(self._measured)
            try:
                work(some)
                continue
            except (RuntimeError, MemoryError) as error:
                if len(some) == 1 or whole or not is_short(error):
                    raise
            again = sum(len(numbers) for numbers, _, _ in self._measured[measured:])
            del self._measured[measured:]
            self.progress.update(-again)
            half = (len(some) + 1) // 2
            tokens = max(node.start + len(node.tokens) for _, node in some)
            self.capacity = min(self.capacity, half * tokens)
            freed("continuations", len(some), half)
            waiting += [some[half:], some[:half]]

    def _batches(self, nodes: list[tuple[int, Node]]) -> list[list[tuple[int, Node]]]:
        """Nodes of one start, the longest first, so many together as memory takes and little padding allows."""
        batches: list[list[tuple[int, Node]]] = []
        for row, node in sorted(nodes, key=lambda place: -len(place[1].tokens)):
            batch = batches[-1] if batches else []
            tokens = (len(batch) + 1) * len(batch[0][1].tokens) if batch else 0
            padding = tokens - sum(len(other.tokens) for _, other in batch) - len(node.tokens)
            kept = (len(batch) + 1) * node.start + tokens
            if batch and tokens <= MOST_TOKENS and kept <= self.capacity and padding <= MOST_PADDING:
                batch.append((row, node))
            else:
                batches.append([(row, node)])
        return batches

    def _pass(self, cache: Any, keep: bool, batch: list[tuple[int, Node]]) -> Any:
        """Compute nodes of one start, note what they predict, and give the cache that ends with them."""
        import torch
        from torch.nn.functional import log_softmax
        from transformers.cache_utils import DynamicCache

        device = self.targets.device
        if cache is not None:
            cache = _rows_of(cache, [row for row, _ in batch], keep)
        elif keep:
            cache = DynamicCache(config=self.model.config)
        ids, _ = padded([node.tokens for _, node in batch], device)
        scored = [(row, place, number) for row, (_, node) in enumerate(batch) for place, number in node.scored]
        places = sorted({place for _, place, _ in scored}) or [ids.shape[1] - 1]
        logits = self.model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=torch.tensor(places, device=device),
        ).logits
        if scored:
            cells = {cell: index for index, cell in enumerate(dict.fromkeys((row, place) for row, place, _ in scored))}
            column = {place: index for index, place in enumerate(places)}
            rows, columns = zip(*((row, column[place]) for row, place in cells), strict=True)
            log_probs = log_softmax(logits[list(rows), list(columns)], dim=-1, dtype=self.softmax_dtype)
            numbers = torch.tensor([number for _, _, number in scored], device=device)
            at = torch.tensor([cells[row, place] for row, place, _ in scored], device=device)
            targets = self.targets[numbers]
            measured = numbers, log_probs[at, targets], log_probs.argmax(dim=-1)[at] == targets
            self._measured.append(measured)
            self.parts.add(lambda: [one.tolist() for one in measured])
            self.progress.update(len(scored))
        return cache


def _rows_of(cache: Any, rows: list[int], keep: bool) -> Any:
    """A cache to go on from these rows, one after another, that takes in what is computed next only if it is to `keep`.

    If not, a layer's rows are put together when it attends, and their memory is free for the next layer's.
    """
    taken = copy.copy(cache)
    taken.layers = [copy.copy(layer) for layer in cache.layers]
    for layer, before in zip(taken.layers, cache.layers, strict=True):
        if keep:
            layer.keys, layer.values = _picked(before.keys, rows), _picked(before.values, rows)
        else:
            layer.update = partial(_joined, before, rows)
    return taken


def _picked(states: Any, rows: list[int]) -> Any:
    """Rows of keys or values, (B, heads, T, width); one row alone is not copied for it."""
    return states.expand(len(rows), -1, -1, -1) if len(states) == 1 else states[rows]


def _joined(before: Any, rows: list[int], keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
    """What a cache's layer holds in these rows and what follows; the layer stays as it is."""
    import torch

    return (
        torch.cat([_picked(before.keys, rows), keys], dim=-2),
        torch.cat([_picked(before.values, rows), values], dim=-2),
    )
