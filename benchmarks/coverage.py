"""What the report's 95% intervals cover: simulated studies whose true value is known.

    python benchmarks/coverage.py [--studies 2000] [--items 200] [--tasks 8,2]

A study is a difference of two arms: T tasks of N items by S seeds, with a variance of items and of noise, in shares
squared, as the embedded study has them (0.067 and 0.063), and several of seeds, in percentage points squared (observed:
0.2 to 0.5 for the average, up to some 2 for one family). Beside the intervals of `sdd.report.intervals` stands what a
percentile bootstrap over seeds, then items covers: the report's former way, here as its normal form.
"""

import argparse
import math

import numpy as np

from sdd.report.intervals import half_width

ITEMS, NOISE = 0.067, 0.063
SEEDS = (0.0, 0.2, 0.5, 2.0, 10.0)


def bootstrap_half_width(tables: list[np.ndarray]) -> float:
    """Of a bootstrap that draws seeds, then items of each task: noise enters it three times."""
    seeds = len(tables[0])
    columns = np.sum([table.mean(axis=1) for table in tables], axis=0)
    variance = columns.var() / seeds
    for table in tables:
        items = table.shape[1]
        rest = table - table.mean(axis=0) - table.mean(axis=1, keepdims=True) + table.mean()
        variance += table.mean(axis=0).var() / items + rest.var() / (seeds * items)
    return 1.96 * math.sqrt(variance)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=2000)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--tasks", default="8,2")
    arguments = parser.parse_args()
    print("tasks  seeds  variance of seeds  covered  half-width  bootstrap covered  half-width")
    for tasks in map(int, arguments.tasks.split(",")):
        for spread in SEEDS:
            for seeds in (2, 3, 5, 8):
                rng = np.random.default_rng([tasks, seeds, round(10 * spread)])
                halves = {half_width: [], bootstrap_half_width: []}
                covered = {half_width: 0, bootstrap_half_width: 0}
                for _ in range(arguments.studies):
                    own = rng.normal(0, math.sqrt(spread) / 100, (seeds, 1))
                    shape = seeds, arguments.items
                    tables = [
                        (own + rng.normal(0, ITEMS**0.5, shape[1]) + rng.normal(0, NOISE**0.5, shape)) / tasks
                        for _ in range(tasks)
                    ]
                    mean = sum(table.mean() for table in tables)
                    for way, found in halves.items():
                        found.append(way(tables))
                        covered[way] += abs(mean) <= found[-1]
                line = f"{tasks:5}  {seeds:5}  {spread:17.1f}"
                for way, found in halves.items():
                    line += f"  {100 * covered[way] / arguments.studies:7.1f}  {100 * np.mean(found):10.2f}"
                print(line, flush=True)


if __name__ == "__main__":
    main()
