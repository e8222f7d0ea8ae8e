"""How arms look, in the PNGs and on the page: a colour, marker, hatch and dash a mode, so that none is needed alone.

Merged students look like the method that merged them. Colours of modes are from the Okabe-Ito palette where it has
room; all are told apart with the common colour deficiencies too, on white and, as `on_dark`, on the page's dark ground.
Arms of one mode get lighter tints and other line styles in turn. Text is dark grey, grids are faint, titles say what is
shown and the line under them says how much data it rests on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd.finetuning.modes import MODES as TUNING
from sdd.finetuning.modes import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
INK = "#222222"
SOFT = "#666666"
WHITE = "#FFFFFF"


_STAR = "M0,-1.1L0.26,-0.36L1.05,-0.34L0.42,0.14L0.65,0.89L0,0.44L-0.65,0.89L-0.42,0.14L-1.05,-0.34L-0.26,-0.36Z"
_HEXAGON = "M0,-1L0.87,-0.5L0.87,0.5L0,1L-0.87,0.5L-0.87,-0.5Z"
MODES = {
    "teacher": Style("#333333", "#F0F0F0", "*", _STAR, "★", ""),
    "pruned": Style("#707070", "#A3A3A3", "s", "square", "■", ""),
    **{name: mode.look for name, mode in TUNING.items()},
    "slerp": Style("#620175", "#AD4AB9", "P", "cross", "✚", "\\\\", (0, (8, 2, 2, 2))),
    "linear": Style("#BD54F1", "#CED0FC", ">", "triangle-right", "▶\ufe0e", "||", (0, (3, 1.5))),
    "task_arithmetic": Style("#6A485D", "#DA1E65", "<", "triangle-left", "◀\ufe0e", "oo", (0, (8, 2, 2, 2, 2, 2))),
    "ties": Style("#4206D6", "#7A68FE", "h", _HEXAGON, "⬢", "OO", (0, (1, 1, 4, 1))),
}
"""By what `Arm.look` says."""
OTHER = Style("#56B4E9", "#337777", "v", "triangle-down", "▼", "--")
LINES = ((0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
"""Of the second arm of a mode and those after it; the first has the mode's own."""
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
    "text.parse_math": False,  # names of others may hold a $
}


@dataclass(frozen=True)
class Look:
    colour: str
    marker: str
    symbol: str
    hatch: str
    line: Any
    filled: bool


def mixed(colour: str, other: str, share: float) -> str:
    """`colour` with a share of another in it."""
    pairs = ((int(colour[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + (towards - value) * share):02X}" for value, towards in pairs)


def looks(modes: list[str]) -> list[Look]:
    """A look for each arm given its mode; arms of one mode differ in tint, line style and marker filling."""
    seen: dict[Style, int] = {}
    arm_looks = []
    for style in (MODES.get(mode, OTHER) for mode in modes):
        turn = seen[style] = seen.get(style, -1) + 1
        colour, hatch = mixed(style.colour, WHITE, TINTS[turn % len(TINTS)]), style.hatch * (1 + turn % 3)
        line = (style.line, *LINES)[turn % len(TINTS)]
        arm_looks.append(Look(colour, style.marker, style.symbol, hatch, line, turn % 2 == 0))
    return arm_looks


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
