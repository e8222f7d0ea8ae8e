"""Prune by a criterion of your own: a class in `mine/metrics.py`, an option in `mine/conf/metric/`.

PYTHONPATH=. python examples/own_metric.py

The same on the command line: PYTHONPATH=examples python prune.py --config-dir=examples/mine/conf metric=middle \
    allow=mine.metrics.Middle
"""

import json
from pathlib import Path

from sdd.api import compose

CONF = Path(__file__).parent / "mine" / "conf"

for centre in (0.5, 0.75):
    job = compose("metric=middle", f"metric.centre={centre}", "allow=mine.metrics.Middle", config_dir=CONF)
    pruned = job.wanted("prune")
    removed = json.loads((job.build(pruned) / "pruning.json").read_text())["removed_blocks"]
    print(f"centre {centre}: blocks {removed} removed")
