"""All benchmarks in one table; or in a minute, whether one has become much slower.

    python -m benchmarks [NAME ...] [--device cuda] [--data FOLDER] [--trl PYTHON] [--stories MODEL TEXTS]
                         [--out outputs/benchmarks]
    python -m benchmarks --quick

The first form prints the table and writes it as Markdown, and as JSON with every turn's seconds; `--data` has rows of
public tasks for `evaluation`, as `evaluation.data_dir` does, `--trl` is the python of an environment with TRL, for
`finetuning`; `--stories` adds a writer of stories, such as stories260K, and stories as JSON objects with a `text`, one
a line, to `scores`, `generation` and `finetuning`. On a GPU models and their rows are moved there, and it is waited for
when seconds are taken; what works on files or processes stays as it is. Where results differ it ends in 1; a ratio
below what was asked is told in the table.

The second form compares every stage with its physical limit on small models on a CPU, and ends in 1 where one reaches
less than half of its usual share of it. Other machines have other shares: the bounds are wide for that.
"""

import argparse
import os
import sys
import time
from importlib import import_module
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

NAMES = ("scores", "sdm", "checkpoints", "generation", "evaluation", "finetuning", "overhead")
USUAL = {"scores": 0.95, "checkpoints": 0.3, "generation": 0.4, "evaluation": 0.3, "finetuning": 0.75}
"""Share of its limit that a benchmark's quick form usually reaches; of few rows on a small model, less than of many."""


def quick() -> int:
    slower = []
    for name, usual in USUAL.items():
        started = time.perf_counter()
        share = import_module(f"benchmarks.{name}").quick()
        taken = time.perf_counter() - started
        print(f"{name:<14}{share:>6.2f} of the limit, usually {usual:.2f} ({taken:.0f} s)", flush=True)
        if share < usual / 2:
            slower.append(name)
    if slower:
        print(f"error: half as fast as usual, or less: {', '.join(slower)}")
    return len(slower) > 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all of them by default")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--turns", type=int, default=5, help="of all ways that are compared")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--trl", type=Path)
    parser.add_argument("--stories", type=Path, nargs=2, metavar=("MODEL", "TEXTS"))
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"))
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in NAMES]:
        parser.error(f"{unknown[0]} is no benchmark; choose from {', '.join(NAMES)}")
    import torch

    from benchmarks.rows import Ratio, Setting, table, write

    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    torch.set_num_threads(1)
    if given.quick:
        return quick()
    stories = tuple(given.stories) if given.stories else None
    setting, rows = Setting(given.device, given.turns, given.data, given.trl, stories), list[Ratio]()
    for name in given.names or NAMES:
        rows += import_module(f"benchmarks.{name}").rows(setting)
        write(rows, given.out, setting.device)
        print(f"{name}: done", file=sys.stderr)
    print(table(rows))
    return 0 if all(row.parity for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
