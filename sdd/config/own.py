"""Classes of the user's own: a criterion, or rows, of a module that the command line allows by its import path.

    python prune.py --config-dir=mine metric=mine allow=my_package.metrics.Mine

No file can allow one, and one that is not allowed is not imported. Its id, which stands in keys, is the import path
with the digest of the file that it is written in, so that a class that changes leads to other addresses. What that
file imports in turn is not in the digest.
"""

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.store import file_digest

CLASSES: dict[str, type[Any]] = {}
"""Id -> class, of all that this process was allowed."""
BASES: Mapping[str, str] = {
    "metric": "sdd.importance.criteria.Criterion",
    "width_metric": "sdd.importance.criteria.Criterion",
    "dataset": "sdd.data.rows.Rows",
    "analysis": "sdd.data.rows.Rows",
}
"""By the node of the config, what a class of the user's own is derived from."""
DIGITS = 16
"""Hexadecimal digits of the source's digest, as of an address."""

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_ID = re.compile(rf"{_PATH.pattern}@[0-9a-f]{{{DIGITS}}}")


def is_own(id: Any) -> bool:
    """Whether an id is of such a class."""
    return isinstance(id, str) and _ID.fullmatch(id) is not None


def allow(path: str) -> str:
    """Import the class of an import path that the user named, and give its id."""
    if not _PATH.fullmatch(path) or path.startswith("sdd."):
        raise UserError(f"allow={path} is no import path of a class of your own, such as my_package.metrics.Mine")
    kind = _imported(path)
    try:
        if not isinstance(kind, type):
            raise TypeError
        source = Path(inspect.getsourcefile(kind) or "")
        id = f"{path}@{file_digest(source)[:DIGITS]}"
    except (TypeError, OSError):
        raise UserError(f"allow={path}: no class that is written in a file, whose digest would be in keys") from None
    if any(other is kind and known != id and known.startswith(f"{path}@") for known, other in CLASSES.items()):
        raise UserError(f"allow={path}: {source.name} has changed since it was imported; start Python anew")
    CLASSES[id] = kind
    return id


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # whatever the user's own module raises
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"allow={path} cannot be imported ({type(error).__name__}: {first}); install its package, or name its "
            "folder in PYTHONPATH"
        ) from None


def check_base(path: str, node: str, where: str) -> None:
    """Refuse an allowed class that is not of the kind that a node of the config takes."""
    if node not in BASES:
        raise UserError(f"{where}={path}: a class of your own can be a metric or a dataset, not this; refused")
    base = BASES[node]
    if not issubclass(_imported(path), _imported(base)):
        raise UserError(f"{where}={path} is not derived from {base}; refused")
