"""The pictures that single artifacts carry: the redundancy heat map, channel curves, the learning curve."""

from pathlib import Path
from typing import Any

from sdd.importance.states import chosen_blocks


def heat_map(scores: dict[str, Any], path: Path) -> None:
    """Score of removing n blocks from block l on, for every n and l; what would be removed is outlined.

    Of blocks that were removed one by one, instead the scores of each step: of removing block l as the n-th.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    blocks = scores["num_blocks"]
    table = np.full((max(1, blocks - 1), blocks), np.nan)
    if "steps" in scores:
        table[: len(scores["steps"])] = np.array([step["scores"] for step in scores["steps"]], dtype=float)
    else:
        for size, row in scores["distance"].items():
            table[int(size) - 1, : len(row)] = row
    figure = Figure(figsize=(max(5.0, 0.32 * blocks + 2.5), max(3.6, 0.26 * blocks + 1.8)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    measured_by_removal = "unit" in scores  # one block that nothing works without would leave the others one colour
    highest = np.nanquantile(table, 0.8) if measured_by_removal else None
    image = axes.imshow(table, aspect="auto", origin="lower", cmap="viridis", vmax=highest)
    for size in range(1, 1 + len(scores["steps"]) if "steps" in scores else blocks):
        removed, _ = chosen_blocks(scores, size)
        if "order" in scores:
            axes.plot(removed, [size - 1] * size, "s", markersize=4, markerfacecolor="none", markeredgecolor="#d62728")
        else:
            corner = (removed[0] - 0.5, size - 1.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#d62728", linewidth=2))
    marked = "squares: blocks removed" if "order" in scores else "outlined: start of the span removed"
    measured = f"{scores['num_texts']} texts" if scores["num_texts"] else "no texts"
    axes.set_title(f"{scores['metric']}: lower is more redundant ({measured})\n{marked}", fontsize=10)
    axes.set_xlabel("block" if "steps" in scores else "first removed block")
    axes.set_ylabel("blocks removed")
    step = 1 if blocks <= 16 else 4
    axes.set_xticks(range(0, blocks, step))
    axes.set_yticks(range(0, blocks - 1, step), [str(n) for n in range(1, blocks, step)])
    unit = scores.get("unit", "angle / pi" if scores["metric"] == "angular" else "score")
    figure.colorbar(image, ax=axes, label=unit, extend="max" if measured_by_removal else "neither")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def learning_curve(history: list[dict[str, Any]], path: Path) -> None:
    """Training and validation loss in nats per target token against the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [row["step"] for row in history], [row["loss"] for row in history]
    axes.plot(steps, losses, color="#4477aa", linewidth=1, label="training")
    held_out = [(r["step"], r["validation_loss"]) for r in history if r["validation_loss"] is not None]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color="#ee6677", label="validation")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("nats per target token")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def channel_curves(channels: list[list[float]], metric: str, num_texts: int, path: Path) -> None:
    """Each block's importance of channels from the highest to the lowest: how many of them matter little."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scale = Normalize(0, max(1, len(channels) - 1))
    for block, importance in enumerate(channels):
        share = [(rank + 1) / len(importance) for rank in range(len(importance))]
        axes.plot(share, sorted(importance, reverse=True), color=colormaps["viridis"](scale(block)), linewidth=1)
    measured = f"{num_texts} texts" if num_texts else "no texts"
    axes.set_title(f"{metric}: higher is more important ({measured})", fontsize=10)
    axes.set_xlabel("share of the channels, most important first")
    axes.set_ylabel("importance")
    if all(value >= 0 for importance in channels for value in importance):
        axes.set_yscale("symlog", linthresh=_least_positive(channels))
    figure.colorbar(ScalarMappable(scale, colormaps["viridis"]), ax=axes, label="block")
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _least_positive(channels: list[list[float]]) -> float:
    """Below it a curve is drawn straight; a thousandth of the largest value at the least."""
    values = [value for importance in channels for value in importance if value > 0]
    return max(min(values), max(values) / 1000) if values else 1.0
