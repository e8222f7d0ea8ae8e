"""Training-free repair at a cut: the last kept block's down projection is refitted to stand in for what was removed.

Let block k be the last one before a cut and block j the first one after it. With x the MLP activations that enter block
k's down projection and r all else that makes up block k's output, the projection W (and its bias b, if it has one) is
replaced by the least-squares answer to

    min  sum over tokens |r + W'x + b' - h_j|^2  +  penalty * mean(diag X'X) * |W' - W|^2,

h_j being the state that enters block j in the unpruned model on the same texts. The ridge pulls towards the existing
weights, not towards zero: what the texts say nothing about stays as it was trained. As r + Wx + b is what block k puts
out, only the change W' - W is solved for, from X'X and X'(h_j - output) alone: both are summed in float64 batch by
batch, and nothing of size tokens x activations is kept. Several cuts are repaired in order, each on the states of the
student repaired so far.

Relatives, which *insert* a map of the states at the cut: Ghosted Layers (arXiv 2605.15491), a linear map by ridge
regression in float64; LinearPatch (arXiv 2505.24680), a Hadamard rotation and scales of channels. Refitting a
projection that is there already is a variant of this project: it can correct only what the block's MLP activations
tell, but leaves a stock checkpoint of unchanged shape. Knows nothing of the store or of how the cut was chosen.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from sdd.architectures import explicit_config, refittable
from sdd.errors import UserError
from sdd.forward.batches import length_batches, padded
from sdd.models import checkpoints
from sdd.models.checkpoints import Checkpoint
from sdd.models.files import CODES, read_header
from sdd.store.hashed import HashedFile

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = 0.2
"""Share of the texts, the last ones, on which the repair is measured and not fitted."""

MAX_TOKENS = 16_384
"""Padded tokens of a pass."""

CHUNK = 4096
"""Tokens that are widened to float64 at a time."""


@dataclass(frozen=True)
class Cut:
    """A run of removed blocks: `block` is the kept one before it, at `place` in the student; `end` the first after it.

    `end` is the number of blocks where nothing follows: what leaves the last block is the target then.
    """

    block: int
    place: int
    end: int


def cuts_of(kept: list[int], removed: list[int]) -> list[Cut]:
    """The cuts in order; a user's mistake where one begins with the first block, as no block is left to refit."""
    if 0 in removed:
        raise UserError(
            "repair=ridge refits the block before a cut, and nothing is before block 0; choose a cut that begins "
            "later, for example pruning.start=1, or repair=none"
        )
    ends = [*kept, len(kept) + len(removed)]
    return [Cut(block, place, ends[place + 1]) for place, block in enumerate(kept) if ends[place + 1] - block > 1]


def check_repairable(checkpoint: Checkpoint, blocks: list[int] | None = None) -> dict[int, str]:
    """Where the down projection of each of the `blocks` of a checkpoint is; a user's mistake if one has none to refit.

    Without `blocks`, of all that have one, which is a mistake if none has.
    """
    config = explicit_config(checkpoint.config, checkpoint.where)
    projections = refittable(config, checkpoint.where)
    missing = [block for block in blocks or [] if block not in projections]
    if missing or not projections:
        which = f"block {missing[0]} of {config['architectures'][0]}" if missing else config["architectures"][0]
        raise UserError(
            f"{checkpoint.where}: repair=ridge needs a block that adds its MLP's down projection to its output as it "
            f"is, and {which} does not (a norm or a scale behind it, experts, or an MLP not known here); choose "
            "repair=none"
        )
    return projections


# ---- the regression ---------------------------------------------------------------------------------------------


class Moments:
    """Sums over tokens of x x' and of x d', in float64: (I, I) and (I, D); with `bias`, a last activation of one."""

    def __init__(self, activations: int, width: int, bias: bool, device: Any = "cpu") -> None:
        import torch

        rows = activations + bias
        self.bias = bias
        self.gram = torch.zeros(rows, rows, dtype=torch.float64, device=device)
        self.cross = torch.zeros(rows, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, residual: Tensor) -> None:
        """Tokens' activations (N, I) and what is missing from the block's output to the target (N, D)."""
        import torch

        if self.bias:
            x = torch.nn.functional.pad(x, (0, 1), value=1.0)
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, residual)

    def change(self, penalty: float) -> Tensor:
        """What to add to the projection, (I, D): the ridge solution by Cholesky; the bias, its last row, is free."""
        import torch

        inputs = len(self.gram) - self.bias
        penalised = self.gram.clone()
        diagonal = penalised.diagonal()[:inputs]
        diagonal += penalty * diagonal.mean()
        factor, failed = torch.linalg.cholesky_ex(penalised)
        if failed:
            raise UserError(
                f"repair.penalty={penalty:g} is too small for these calibration texts: the regression has no unique "
                "answer; raise it, or calibration.num_texts"
            )
        return torch.cholesky_solve(self.cross, factor)


class Error:
    """Relative error of a cut: sqrt(sum |output - target|^2 / sum |target|^2) over tokens."""

    def __init__(self) -> None:
        self.residual = self.target = 0.0
        self.tokens = 0

    def add(self, residual: Tensor, target: Tensor) -> None:
        self.residual += float(residual.square().sum())
        self.target += float(target.square().sum())
        self.tokens += len(target)

    @property
    def value(self) -> float:
        return float((self.residual / self.target) ** 0.5)


# ---- the passes -------------------------------------------------------------------------------------------------


@contextmanager
def _last_state(module: Any, entering: bool) -> Iterator[list[Any]]:
    """What a module last took (`entering`) or gave, as the one element of a list."""
    state: list[Any] = [None]

    def before(module: Any, arguments: Any) -> None:
        state[0] = arguments[0]

    def after(module: Any, arguments: Any, output: Any) -> None:
        state[0] = output[0] if isinstance(output, tuple) else output

    handle = module.register_forward_pre_hook(before) if entering else module.register_forward_hook(after)
    try:
        yield state
    finally:
        handle.remove()


@contextmanager
def _first_blocks(model: Any, count: int) -> Iterator[Any]:
    """The body of a model with its first `count` blocks only: no pass goes further than it is looked at."""
    body, layers = checkpoints.decoder(model), checkpoints.blocks(model)
    body.layers = layers[:count]
    try:
        yield body
    finally:
        body.layers = layers


class Passes:
    """Texts through the unpruned model and, where they are not the same, the student: what a cut's regression sees."""

    def __init__(self, original: Any, student: Any | None, batch_size: int) -> None:
        self.original, self.student, self.batch_size = original, student, batch_size

    def tokens(self, cut: Cut, name: str, rows: list[list[int]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For batches of real tokens, in float64: activations (N, I), block output (N, D), target (N, D).

        Up to the first cut the student is the unpruned model, and one pass serves both.
        """
        import torch

        original = self.original
        joint = cut.place == cut.block
        model = original if joint else self.student
        block = checkpoints.blocks(model)[cut.place]
        last_block = checkpoints.blocks(original)[cut.end - 1]
        device = next(original.parameters()).device
        with (
            torch.no_grad(),
            _first_blocks(original, cut.end) as original_body,
            _last_state(block.get_submodule(name), entering=True) as x,
            _last_state(block, entering=False) as output,
            _last_state(last_block, entering=False) as target,
        ):
            for batch in length_batches([len(row) for row in rows], self.batch_size, MAX_TOKENS):
                ids, mask = padded([rows[index] for index in batch], device)
                original_body(input_ids=ids, attention_mask=mask, use_cache=False)
                if not joint:
                    with _first_blocks(model, cut.place + 1) as student_body:
                        student_body(input_ids=ids, attention_mask=mask, use_cache=False)
                real = mask.bool()
                for chunk in zip(*(states[0][real].split(CHUNK) for states in (x, output, target)), strict=True):
                    activations, outputs, targets = (states.double() for states in chunk)
                    yield activations, outputs, targets


def repair(
    source: Checkpoint,
    pruned: Checkpoint,
    facts: dict[str, Any],
    rows: list[list[int]],
    penalty: float,
    dtype: str,
    device: str = "cpu",
    attention: str | None = None,
    batch_size: int = 32,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Refit the projection before every cut of the checkpoint `pruned`, which was cut out of `source`.

    `facts` has the blocks `kept_blocks` and `removed_blocks`; `rows` are token ids of the texts. Returns the new
    tensors by their names in `pruned`, in its dtype, and what was done: errors of each cut before and after, with the
    weights as stored, on the texts fitted on and on those held out.
    """
    cuts = cuts_of(facts["kept_blocks"], facts["removed_blocks"])
    names = check_repairable(source, [cut.block for cut in cuts])
    num_held_out = max(1, round(HELD_OUT * len(rows)))
    if num_held_out >= len(rows):
        raise UserError(
            f"repair=ridge holds out {num_held_out} of the calibration texts, and {len(rows)} is all; give more"
        )
    fitted, held_out = rows[:-num_held_out], rows[-num_held_out:]
    original = source.model(dtype, device, attention)
    student = pruned.model(dtype, device, attention) if len(cuts) > 1 else None
    passes = Passes(original, student, batch_size)
    tensors: dict[str, Tensor] = {}
    cut_errors = []
    for cut in tqdm(cuts, desc="repair", unit="cut"):
        stored = _stored(pruned, cut.place, names[cut.block])
        new_tensors, errors = _refit(passes, cut, names[cut.block], list(stored.values()), (fitted, held_out), penalty)
        tensors |= dict(zip(stored, new_tensors, strict=True))
        cut_errors.append({"block": cut.block, "place": cut.place, **errors})
        if student is not None:
            _put(checkpoints.blocks(student)[cut.place].get_submodule(names[cut.block]), new_tensors)
    summary = {
        "cuts": cut_errors,
        "num_texts": len(rows),
        "texts_fitted": len(fitted),
        "texts_held_out": len(held_out),
        "tokens_fitted": sum(map(len, fitted)),
        "tokens_held_out": sum(map(len, held_out)),
    }
    return tensors, summary


def _refit(
    passes: Passes, cut: Cut, name: str, stored: list[Tensor], rows: tuple[list[Any], list[Any]], penalty: float
) -> tuple[list[Tensor], dict[str, Any]]:
    """The new weight (and bias), and the cut's errors."""
    import torch

    width, activations = stored[0].shape
    device = next(passes.original.parameters()).device
    moments, before = Moments(activations, width, len(stored) > 1, device), Error()
    for x, output, target in passes.tokens(cut, name, rows[0]):
        residual = target - output
        moments.add(x, residual)
        before.add(residual, target)
    change = moments.change(penalty).cpu()
    deltas = [change[:activations].T, *change[activations:]]
    new_tensors = [(old.double() + delta).to(old.dtype) for old, delta in zip(stored, deltas, strict=True)]
    rounded = [(tensor.double() - old.double()).to(device) for tensor, old in zip(new_tensors, stored, strict=True)]
    step = torch.cat([rounded[0].T, *(delta[None] for delta in rounded[1:])])
    explained = float((step * (2 * moments.cross - moments.gram @ step)).sum())
    held_before, held_after = Error(), Error()
    for x, output, target in passes.tokens(cut, name, rows[1]):
        residual = target - output
        held_before.add(residual, target)
        held_after.add(residual - torch.addmm(step[activations:].sum(0), x, step[:activations]), target)
    after = max(0.0, (before.residual - explained) / before.target) ** 0.5
    return new_tensors, {
        "fitted": {"before": before.value, "after": after},
        "held_out": {"before": held_before.value, "after": held_after.value},
    }


def _put(projection: Any, tensors: list[Tensor]) -> None:
    import torch

    with torch.no_grad():
        for parameter, tensor in zip((projection.weight, projection.bias), tensors, strict=False):
            parameter.copy_(tensor)


# ---- the checkpoint ---------------------------------------------------------------------------------------------


def _stored(checkpoint: Checkpoint, place: int, name: str) -> dict[str, Tensor]:
    """Weight and, if there is one, bias of block `place`'s module `name`, by their names in the checkpoint."""
    block = checkpoint.block_tensors[place]
    tensors = [block[key] for key in (f"{name}.weight", f"{name}.bias") if key in block]
    assert tensors, f"block {place} stores no {name}"
    return {tensor.name: tensor.read() for tensor in tensors}


def replace_tensors(source: Checkpoint, target: Path, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint into the folder `target`, the bytes of the named tensors replaced; all else is as it was."""
    import torch

    folder = source.folder
    for path in (folder / "config.json", folder / "model.safetensors.index.json", *source.side_files):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    for path in source.weight_files:
        with path.open("rb") as reader, HashedFile(target / path.name) as writer:
            header, base = read_header(reader, path)
            header.pop("__metadata__", None)
            reader.seek(0)
            writer.copy(reader, base)
            for name, entry in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"][0]):
                begin, end = entry["data_offsets"]
                if name not in tensors:
                    reader.seek(base + begin)
                    writer.copy(reader, end - begin)
                    continue
                tensor = tensors[name]
                expected = entry["dtype"], entry["shape"]
                assert (CODES[str(tensor.dtype).removeprefix("torch.")], list(tensor.shape)) == expected, name
                writer.write(tensor.contiguous().flatten().view(torch.uint8).numpy())
