"""What chosen modules of a model give while it runs: states after blocks, queries, keys and values."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor


@contextmanager
def watching(*watched: Mapping[str, Any]) -> Iterator[list[dict[str, Tensor]]]:
    """While open, tables that are filled with the last output of every module named, one table for each given."""
    tables: list[dict[str, Tensor]] = [{} for _ in watched]

    def hook(table: dict[str, Tensor], name: str) -> Any:
        def after(module: Any, arguments: Any, output: Any) -> None:
            table[name] = output[0] if isinstance(output, tuple) else output

        return after

    handles = [
        module.register_forward_hook(hook(table, name))
        for table, modules in zip(tables, watched, strict=True)
        for name, module in modules.items()
    ]
    try:
        yield tables
    finally:
        for handle in handles:
            handle.remove()
