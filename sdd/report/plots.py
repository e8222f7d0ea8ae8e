"""The plots of a report, each of the largest comparison: written only where there is something to show.

    retention_by_size.png   share of the unpruned model's average that is kept, against blocks removed
    tasks.png               scores per task at the pruning with the most arms
    gain_forgetting.png     what fine-tuning changed on tasks trained on, against tasks not trained on
    learning_curves.png     validation loss against step

All whiskers are the intervals of the tables. `selection` says which arms are shown where there are too many.
"""

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd.errors import UserError
from sdd.report.arms import Arm
from sdd.report.contrasts import Study, changes
from sdd.report.measures import Comparison, trained_tasks
from sdd.report.selection import basis, by_series, labels, pick, seeds_of
from sdd.report.style import SETTINGS, SOFT, legend_outside, looks, new_figure, points, save
from sdd.store.files import AGAIN, check_file
from sdd.untrusted import read_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _whiskers(values: list[dict[str, float]]) -> list[list[float]]:
    """Lengths below and above the means, in percent."""
    below = [max(0.0, 100 * (value["mean"] - value["low"])) for value in values]
    return [below, [max(0.0, 100 * (value["high"] - value["mean"])) for value in values]]


def retention_by_size(comparison: Comparison, rows: dict[str, dict[str, Any]]) -> "Figure | None":
    retained = [arm for arm in comparison.arms if (rows[arm.name]["retention"] or {}).get("ratio_of_means")]
    series = by_series(arm for arm in retained if arm.run.base and arm.run.blocks_removed is not None)
    if not series:
        return None
    chosen = pick([arms[0] for arms in sorted(series.values(), key=len, reverse=True)])
    lines = [arms for arms in series.values() if arms[0] in chosen]
    shown = [arm for arms in lines for arm in arms]
    names, shared = labels([arms[0] for arms in lines], without_pruning=True)
    note = basis(comparison, shown, shared, sum(map(len, series.values())) - len(shown))
    figure, axes = new_figure("Quality kept after removing blocks", note, 8.4, 4.6)
    axes.axhline(100, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)), label="unpruned model", zorder=1)
    step = min(0.07, 0.5 / len(lines))
    for index, (arms, look) in enumerate(zip(lines, looks([arms[0].look for arms in lines]), strict=True)):
        values = [rows[arm.name]["retention"]["ratio_of_means"] for arm in arms]
        dodge = step * (index - (len(lines) - 1) / 2)
        x = [(arm.run.blocks_removed or 0) + dodge for arm in arms]
        y = [100 * value["mean"] for value in values]
        points(axes, look, x, y, names[index], yerr=_whiskers(values))
    sizes = sorted({arm.run.blocks_removed or 0 for arm in shown})
    axes.set_xticks(sizes)
    axes.set_xlim(sizes[0] - 0.7, sizes[-1] + 0.7)
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("blocks removed")
    axes.set_ylabel("retention, % of the unpruned model's average")
    legend_outside(axes)
    return figure


def tasks(comparison: Comparison, rows: dict[str, dict[str, Any]]) -> "Figure | None":
    by_pruning: dict[tuple[str, str | None], list[Arm]] = {}
    for arm in comparison.arms:
        if arm.mode != "teacher":
            by_pruning.setdefault((arm.run.pruning, arm.run.metric), []).append(arm)
    group = max(by_pruning.values(), key=len, default=[])
    arms = [*([comparison.teacher] if comparison.teacher else []), *group]
    if not arms:
        return None
    shown = pick(arms)
    legend, shared = labels(shown)
    trained = set.union(set(), *(trained_tasks(arm, comparison.tasks) or set() for arm in shown))
    names = sorted(comparison.tasks, key=lambda task: task not in trained)
    run = (group or arms)[0].run
    at = "without pruning" if run.pruning == "none" else f"pruning {run.pruning}"
    note = basis(comparison, shown, shared, len(arms) - len(shown)) + ("; * trained on" if trained else "")
    columns = 1 + len(names)
    width = min(16.0, max(7.5, 3.0 + 0.17 * columns * (len(shown) + 1.5)))
    figure, axes = new_figure(f"Score by task, {at}", note, width, 4.8)
    bar = 0.82 / len(shown)
    for index, (arm, look) in enumerate(zip(shown, looks([arm.look for arm in shown]), strict=True)):
        values = [rows[arm.name]["average"], *(rows[arm.name]["tasks"][name] for name in names)]
        axes.bar(
            [(0 if i == 0 else i + 0.35) + bar * (index - (len(shown) - 1) / 2) for i in range(columns)],
            [100 * value["mean"] for value in values],
            bar * 0.92,
            yerr=_whiskers(values),
            color=look.colour,
            hatch=look.hatch,
            error_kw={"elinewidth": 0.9, "capsize": 1.5, "ecolor": "#222222"},
            label=legend[index],
        )
    ticks = ["average", *(f"{name.replace('_', ' ')}{' *' if name in trained else ''}" for name in names)]
    slanted = max(map(len, ticks)) * 0.085 > width / columns * 0.75
    axes.set_xticks([0, *(i + 0.35 for i in range(1, columns))], ticks)
    axes.tick_params(axis="x", length=0, rotation=35 if slanted else 0)
    for label in axes.get_xticklabels() if slanted else []:
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    axes.get_xticklabels()[0].set_fontweight("bold")
    axes.axvline(0.675, color=SOFT, linewidth=0.8)
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.55, columns - 0.1)
    axes.set_ylim(0, max(100, axes.get_ylim()[1]) if axes.get_ylim()[1] > 75 else None)
    axes.set_ylabel("score, %")
    legend_outside(axes, handlelength=2.2, handleheight=1.1)
    return figure


def gain_forgetting(comparison: Comparison, change: dict[str, dict[str, dict[str, Any]]]) -> "Figure | None":
    """`change` is `contrasts.changes`: an arm's differences to its model before fine-tuning, by measure."""
    arms = [arm for arm in comparison.arms if {"trained_on", "not_trained_on"} <= change.get(arm.name, {}).keys()]
    if not arms:
        return None
    shown = pick(arms)
    names, shared = labels(shown)
    note = basis(comparison, shown, shared, len(arms) - len(shown))
    figure, axes = new_figure("Gain and forgetting: change by fine-tuning", note, 8.4, 5.2)
    for line in (axes.axhline, axes.axvline):
        line(0, color=SOFT, linewidth=1.0)
    for index, (arm, look) in enumerate(zip(shown, looks([arm.look for arm in shown]), strict=True)):
        x, y = change[arm.name]["not_trained_on"], change[arm.name]["trained_on"]
        number = f"{index + 1}  " if len(shown) > 2 else ""
        at = 100 * x["mean"], 100 * y["mean"]
        points(axes, look, at[:1], at[1:], number + names[index], size=9, xerr=_whiskers([x]), yerr=_whiskers([y]))
        axes.annotate(number.strip(), at, (6, 5), textcoords="offset points", fontsize=8.5, fontweight="bold")
    axes.margins(0.12)
    corners = {(0.99, 0.98): "gains on both", (0.01, 0.98): "gains, forgets", (0.99, 0.02): "only other tasks gain"}
    for (x_at, y_at), text in {**corners, (0.01, 0.02): "loses on both"}.items():
        across, up = ("right" if x_at > 0.5 else "left"), ("top" if y_at > 0.5 else "bottom")
        inside = _has_quadrant(axes.get_xlim(), x_at) and _has_quadrant(axes.get_ylim(), y_at)
        if inside:
            axes.text(
                x_at, y_at, text, transform=axes.transAxes, ha=across, va=up, fontsize=8.5, color=SOFT, style="italic"
            )
    axes.set_xlabel("change on tasks not trained on, percentage points")
    axes.set_ylabel("change on tasks trained on, percentage points")
    legend_outside(axes, title="against its model before fine-tuning", alignment="left")
    return figure


def _has_quadrant(limits: tuple[float, float], at: float) -> bool:
    """Whether the axis reaches clearly past zero on the side of a corner label."""
    side = limits[1] if at > 0.5 else -limits[0]
    return side > 0.2 * (limits[1] - limits[0])


def read_history(path: Path) -> list[tuple[float, float]]:
    """(step, validation loss) where it was measured; empty if there is no history."""
    if not path.exists():
        return []
    check_file(path, path.parent)
    lines = read_text(path, f"{path}").splitlines()
    try:
        rows = [(row.get("step"), row.get("validation_loss")) for row in csv.DictReader(lines)]
        measured = [(float(step), float(loss)) for step, loss in rows if step and loss]
    except (ValueError, csv.Error):
        raise UserError(f"{path} has a broken row; {AGAIN}") from None
    return [(step, loss) for step, loss in measured if math.isfinite(loss)]


def learning_curves(comparison: Comparison) -> "Figure | None":
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for arm in comparison.arms:
        arm_curves = [curve for run in arm.runs for path in run.histories if (curve := read_history(path))]
        if arm_curves:
            curves[arm.name] = arm_curves
    arms = [arm for arm in comparison.arms if arm.name in curves]
    if not arms:
        return None
    shown = pick(arms)
    names, shared = labels(shown)
    parts = [f"all {shared}"] if shared else []
    parts += ["thin: one seed, thick: mean over seeds", *seeds_of(shown)]
    parts += [f"{len(arms) - len(shown)} more arms not shown"] if len(arms) > len(shown) else []
    note = "; ".join([*parts, "losses on different targets are not comparable in height"])
    figure, axes = new_figure("Validation loss during fine-tuning", note, 8.4, 4.6)
    for arm, name, look in zip(shown, names, looks([arm.look for arm in shown]), strict=True):
        for curve in curves[arm.name]:
            axes.plot(*zip(*curve, strict=True), color=look.colour, linewidth=0.7, alpha=0.55)
        steps = sorted(set.intersection(*({step for step, _ in curve} for curve in curves[arm.name])))
        means = [sum(dict(curve)[step] for curve in curves[arm.name]) / len(curves[arm.name]) for step in steps]
        axes.plot(
            steps,
            means,
            color=look.colour,
            linewidth=2.0,
            linestyle=look.line,
            marker=look.marker,
            markersize=5,
            markerfacecolor=look.colour if look.filled else "white",
            markevery=max(1, len(steps) // 8),
            label=name,
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("validation loss, nats per target token")
    legend_outside(axes)
    return figure


def write_plots(study: Study, out: Path) -> None:
    """Draw the largest comparison; a plot of an earlier report that has nothing to show any more is removed."""
    import matplotlib

    comparison = study.comparisons[0]
    rows = {row["arm"]: row for row in study.rows}
    with matplotlib.rc_context(SETTINGS):
        figures = {
            "retention_by_size.png": retention_by_size(comparison, rows),
            "tasks.png": tasks(comparison, rows),
            "gain_forgetting.png": gain_forgetting(comparison, changes(study, comparison)),
            "learning_curves.png": learning_curves(comparison),
        }
        for name, figure in figures.items():
            (out / name).unlink(missing_ok=True)
            if figure is not None:
                save(figure, out / name)
