"""Make a full checkpoint of a pruned or fine-tuned student, which stock transformers opens.

python -m sdd.export ADDRESS FOLDER [--artifacts DIR] [--dtype bfloat16] [--source DIGEST=PATH]
"""

import argparse
import sys
import tempfile
from pathlib import Path

from sdd import models
from sdd.errors import UserError
from sdd.stages.runtime import Runtime
from sdd.stages.sources import add_arguments, runtime_of
from sdd.stages.student import base_folder, open_student
from sdd.store import Store

EXPORTED = ("pruned", "tuned", "merged")


def export(store: Store, address: str, target: Path, runtime: Runtime, dtype: str | None = None) -> Path:
    """Write the student into the new folder `target`; `dtype` is by default that of the base checkpoint."""
    source = store.find(address)
    if source.parent.name not in EXPORTED:
        raise UserError(f"{source.parent.name}/{source.name} is no model; export a pruned or tuned artifact")
    if target.exists():
        raise UserError(f"{target} exists; name a new folder")
    base = base_folder(source, runtime) if source.parent.name == "tuned" else source
    config = models.read_config(base)
    kept = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        folder = Path(temporary) / "checkpoint"
        model, _ = open_student(source, runtime, kept)
        models.save_model(model, folder, base)
        folder.rename(target)
    return target


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sdd.export", description="Make a full checkpoint of a student.")
    parser.add_argument("address", help="address of a pruned or tuned artifact")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        store = Store(arguments.artifacts.absolute())
        print(export(store, arguments.address, arguments.folder, runtime_of(arguments), arguments.dtype))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
