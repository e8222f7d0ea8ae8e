"""Score, prune and evaluate from Python: the artifacts are those of the command line, and are found by it.

PYTHONPATH=. python examples/from_python.py
"""

import json

from sdd.api import compose

words = ["metric=angular", "calibration.num_texts=16", "pruning=n2", "finetune=none"]
job = compose(*words, "evaluation.tasks=[arithmetic,fact_choice]", "evaluation.limit=8")
pruned = job.wanted("prune")
scores = json.loads((job.build(pruned.inputs["scores"]) / "scores.json").read_text())
student = json.loads((job.build(pruned) / "pruning.json").read_text())
evaluated = job.wanted("evaluate")
results = json.loads((job.build(evaluated) / "results.json").read_text())

print(f"blocks {student['removed_blocks']} removed, {min(scores['distance']['2']):.3f} pi apart before and after")
print(f"what is left gets {results['average']:.0%} right")
