"""One pass of a model over texts, shown block by block to a criterion. No logits, no kept activations.

Texts are batched by length, so that little padding is computed; the criterion sees each block's entering and leaving
states as they pass. Where all that it keeps are sums, a pass that was killed goes on. Knows nothing of what the
criterion computes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from sdd.errors import UserError
from sdd.forward import sums
from sdd.models import checkpoints
from sdd.models.chats import text_ids


def tokenize_texts(tokenizer: Any, texts: list[str], max_length: int) -> list[list[int]]:
    """Token ids with the tokenizer's default special tokens and no others, cut to `max_length`; at least 2 a text."""
    rows = [text_ids(tokenizer, text, max_length) for text in texts]
    for number, row in enumerate(rows, 1):
        if len(row) < 2:
            raise UserError(f"calibration: text {number} has {len(row)} token; a text needs at least 2")
    return rows


def length_batches(lengths: Sequence[int], batch_size: int, max_tokens: int) -> list[list[int]]:
    """Indices grouped by similar length, longest first; at most `batch_size` rows and `max_tokens` padded tokens."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        current = batches[-1] if batches else None
        if current and len(current) < batch_size and lengths[current[0]] * (len(current) + 1) <= max_tokens:
            current.append(index)
        else:
            batches.append([index])
    return batches


def padded(rows: Sequence[list[int]], device: Any = "cpu", left: int | None = None) -> tuple[Any, Any]:
    """Ids and attention mask of rows of token ids, both (B, T); padded on the right, or with the token `left` there."""
    import torch

    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), left or 0)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(len(row)) if left is None else slice(longest - len(row), longest)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids.to(device), mask.to(device)


class Observer(Protocol):
    """What is told of every block's states.

    One that keeps nothing but sums from batch to batch may have them as `sums`, float64 tensors by name: they are set
    to zero before a batch, and to the sums over all batches after the last. A batch that memory did not last for is
    then shown again from its first block, in halves.
    """

    def observe(self, block: int, entering: Any, leaving: Any, mask: Any) -> None:
        """States before and after a block, (B, T, hidden) each, and the mask of real tokens, (B, T)."""

    def finish_batch(self) -> None:
        """The batch has passed all blocks."""


def show_texts(
    model: Any,
    criterion: Observer,
    rows: list[list[int]],
    batch_size: int,
    max_tokens: int = 16_384,
    kept: Path | None = None,
    what: Any = None,
) -> None:
    """Run the texts through the model's blocks, telling the criterion of every block's states.

    Its sums are kept in the file `kept`, as being of `what`.
    """
    import torch

    body, layers = checkpoints.decoder(model), checkpoints.blocks(model)
    device = next(model.parameters()).device
    mask = torch.empty(0)
    entering: list[Any] = [None]

    def before(module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        entering[0] = arguments[0] if arguments else keywords["hidden_states"]

    def after(block: int) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            leaving = output[0] if isinstance(output, tuple) else output
            place = leaving.device  # the block's own, where a model is spread over several
            criterion.observe(block, entering[0].to(place), leaving, mask.to(place))

        return hook

    own: sums.Sums | None = getattr(criterion, "sums", None)

    def show(batch: Sequence[int]) -> sums.Sums:
        nonlocal mask
        for total in (own or {}).values():
            total.zero_()
        ids, mask = padded([rows[index] for index in batch], device)
        body(input_ids=ids, attention_mask=mask, use_cache=False)
        criterion.finish_batch()
        progress.update(len(batch))
        return {name: total.clone() for name, total in (own or {}).items()}

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [layer.register_forward_hook(after(index)) for index, layer in enumerate(layers)]
    batches = length_batches([len(row) for row in rows], batch_size, max_tokens)
    try:
        with torch.no_grad(), tqdm(total=len(rows), desc="scores", unit="text") as progress:
            whole = sums.over(batches, show, progress, kept if own else None, what, again=bool(own))
        for name, total in whole.items():
            (own or {})[name].copy_(total)
    finally:
        for handle in handles:
            handle.remove()
