"""Two or more students of one base become one: `formulas` of tensors, and the `streaming` of whole checkpoints."""

from sdd.merging.formulas import linear, slerp, task_arithmetic, ties

__all__ = ["linear", "slerp", "task_arithmetic", "ties"]
