"""Sums over batches of rows, written down as they grow, so that a pass that was killed goes on where it stood.

They are added in the order of the batches, in float64: a pass that went on, or that several ranks shared, ends with the
bytes of one process that was not killed. Knows nothing of what is added up.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd.forward import ranks
from sdd.forward.memory import Halving
from sdd.store import digest_of

if TYPE_CHECKING:
    from torch import Tensor

EVERY = 5.0
"""Seconds after which sums are written down, and once after the last batch; a kill costs as many, and a batch."""

Sums = dict[str, "Tensor"]


def over(
    batches: Sequence[list[int]],
    of: Callable[[Sequence[int]], Sums],
    progress: Any,
    kept: Path | None = None,
    what: Any = None,
    again: bool = True,
) -> Sums:
    """The sums of what `of` says of each batch, by name, in float64 on the CPU.

    They are kept in the file `kept`, and taken from there if it says that they are of these batches and of `what`.
    `progress` counts how often a row is passed; `of` moves it, and what is taken from the file is left out of it. A
    batch that memory does not last for is begun `again` in halves, whose sums are added.
    """
    halving = Halving("texts")
    asked = digest_of([what, batches])
    done, total = _read(kept, asked)
    whole, left = (sum(map(len, some)) for some in (batches, ranks.own(batches[done:])))
    progress.total = progress.total * left // max(1, whole)
    written = time.monotonic()
    while done < len(batches):
        batch = ranks.own(batches[done : done + ranks.number()])
        own: Sums = {}
        for one in batch:
            for _, part in halving(of, one) if again else [(one, of(one))]:
                _add(own, _doubled(part))
        for part in _of_all(own):
            _add(total, part)
        done = min(len(batches), done + ranks.number())
        if kept and ranks.rank() == 0 and (done == len(batches) or time.monotonic() - written >= EVERY):
            _write(kept, total, {"of": asked, "batches": str(done)})
            written = time.monotonic()
    return total


def _add(total: Sums, part: Sums) -> None:
    for name, value in part.items():
        total[name] = total[name] + value if name in total else value


def _doubled(part: Sums) -> Sums:
    """In float64 on the CPU."""
    return {name: value.double().cpu().contiguous() for name, value in part.items()}


def _of_all(own: Sums) -> list[Sums]:
    """What each rank says of its batch; nothing where it has none."""
    from safetensors.torch import load, save

    return list(map(load, ranks.told(save(own)))) if ranks.is_rank() else [own]


def _read(path: Path | None, asked: str) -> tuple[int, Sums]:
    """How many batches the sums in a file are of, and the sums; none where it is damaged, or of something else.

    A folder may have come from elsewhere. To begin anew costs time, and ends with the same bytes.
    """
    if path is None or path.is_symlink() or not path.is_file():
        return 0, {}
    from safetensors import SafetensorError, safe_open

    with contextlib.suppress(SafetensorError, OSError, ValueError), safe_open(path, "pt") as file:
        said = file.metadata() or {}
        if said.get("of") == asked:
            return int(said["batches"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return 0, {}


def _write(path: Path, sums: Sums, said: dict[str, str]) -> None:
    """There whole or not at all."""
    from safetensors.torch import save_file

    half = path.with_suffix(".half")
    save_file({name: part.contiguous() for name, part in sums.items()}, half, said)
    half.replace(path)
