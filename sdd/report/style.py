"""How the plots look: one colour, marker and hatch per mode, so that a mode is known without its colour.

Colours are from the Okabe-Ito palette, which people with the common colour deficiencies tell apart. Arms of one mode
get lighter tints and other line styles in turn. Text is dark grey, grids are faint, titles say what is shown and the
line under them says how much data it rests on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
INK = "#222222"
SOFT = "#666666"
MODES = {
    "teacher": ("#3A3A3A", "*", ""),
    "pruned": ("#8C8C8C", "s", ""),
    "sft": ("#0072B2", "o", "//"),
    "logit_distill": ("#E69F00", "X", "++"),
    "self_distill": ("#D55E00", "^", ".."),
    "gold": ("#009E73", "D", "xx"),
    "merged": ("#CC79A7", "P", "\\\\"),
}
OTHER = ("#56B4E9", "v", "--")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
TINTS = (0.0, 0.3, 0.5, 0.64)
SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "hatch.linewidth": 0.6,
    "hatch.color": "white",
}


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    hatch: str
    line: Any
    filled: bool


def mixed(colour: str, other: str, share: float) -> str:
    """`colour` with a share of another in it."""
    pairs = ((int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + (towards - value) * share):02X}" for value, towards in pairs)


def looks(modes: list[str]) -> list[Look]:
    """A look for each arm given its mode; arms of one mode differ in tint, line style and marker filling."""
    seen: dict[str, int] = {}
    found = []
    for mode in modes:
        turn = seen[mode] = seen.get(mode, -1) + 1
        colour, marker, hatch = MODES.get(mode, OTHER)
        tint = TINTS[turn % len(TINTS)]
        found.append(
            Look(
                mixed(colour, "#FFFFFF", tint), marker, hatch * (1 + turn % 3), LINES[turn % len(LINES)], turn % 2 == 0
            )
        )
    return found


def new_figure(title: str, subtitle: str, width: float, height: float) -> tuple["Figure", "Axes"]:
    """One axes under a bold title and a grey line or two that say what it rests on."""
    import textwrap

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lines = textwrap.wrap(subtitle, int(width * 14))
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", pad=14 + 12.5 * len(lines))
    under: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    axes.annotate("\n".join(lines), (0, 1), (0, 9), va="bottom", fontsize=9, color=SOFT, linespacing=1.3, **under)
    return figure, axes


def points(
    axes: "Axes", look: Look, x: Sequence[float], y: Sequence[float], label: str, size: float = 7, **whiskers: Any
) -> None:
    """Markers on a line with whiskers; only the marker and the line go into the legend."""
    face = look.colour if look.filled else "white"
    axes.errorbar(x, y, fmt="none", ecolor=look.colour, elinewidth=1.2, capsize=3, **whiskers)
    line: dict[str, Any] = {"linestyle": look.line if len(x) > 1 else "none", "linewidth": 1.6}
    axes.plot(x, y, color=look.colour, marker=look.marker, markersize=size, markerfacecolor=face, label=label, **line)


def legend_outside(axes: "Axes", **settings: Any) -> None:
    """The legend to the right of the axes, where it covers no data."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **settings)


def save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, dpi=DPI, facecolor="white")
