"""What each stage of a usual run takes on one GPU, for a model's header; sizes, times and prices as one reads them."""

import math

from sdd.evaluation.suites import SUITES
from sdd.planning import estimates
from sdd.planning.cost_model import DEVICES, CostModel, Shape
from sdd.planning.estimates import Training
from sdd.rewriting.engines import chunk_rows

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


def requirements(shape: Shape) -> list[str]:
    """What each stage of a usual run takes on one GPU: the lines that stand in the header of a model's option."""
    device, blocks = DEVICES["gpu"], max(1, round(shape.blocks * 0.8))
    whole, cut = CostModel(shape, shape.blocks, 2, device), CostModel(shape, blocks, 2, device)
    training = Training(estimates.adapter_parameters(shape, blocks, 16, ["all-linear"]))
    tasks = estimates.tasks_of({entry.task: (1, entry.shots or 0, False) for entry in SUITES["openllm_v1"]})
    stages = {
        "scores, 128 texts of 1,024 tokens": estimates.scores(whole, 128, 1024, 16),
        f"pruned, {shape.blocks - blocks} of {shape.blocks} blocks removed": estimates.pruned(cut),
        "rewrites, 7,473 GSM8K rows": estimates.rewrites(whole, 7473, 210, 72, 144, 32, chunk_rows(32)),
        "tuned, 2 epochs of them, rank 16": estimates.tuned(cut, training, 2 * 7373, 160, 32, 4096),
        "evaluated, OpenLLM v1": estimates.evaluated(cut, tasks, None, 8),
    }
    formulas = "by the formulas of sdd/planning/estimates.py, not measured"
    lines = [f"Each stage on {device.name}, {formulas}: time, memory, disk."]
    for what, one in stages.items():
        lines.append(f"  {what:<34} {duration(one.seconds):>7} {size(one.memory):>8} {size(one.disk):>8}")
    return lines


def duration(seconds: float) -> str:
    """Rounded for reading: seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes rounded for reading, in powers of 1,000."""
    if count < 1e8:
        return f"{max(count, 1e4) / 1e6:.2g} MB"
    return f"{count / 1e9:.2g} GB" if count < 1e10 else f"{count / 1e9:,.0f} GB"


def flops(student: float, teacher: float) -> str:
    """Of student and teacher, those that there are: '142 G + 244 G'."""
    return " + ".join(_si(number) for number in (student, teacher) if number)


def _si(number: float) -> str:
    """Three digits of a number from 1 on, with a prefix of the SI."""
    power = min(max(0, int(math.log10(number) // 3)), len(PREFIXES) - 1)
    return f"{number / 1000**power:.3g} {PREFIXES[power]}".rstrip()
