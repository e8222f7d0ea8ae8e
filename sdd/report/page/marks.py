"""What the charts are made of: rows of arms, looks, lines with whiskers, and the specification that comes of them.

Every mark that stands for an arm carries its name, its evaluated addresses and a link to how it was made. Arms look as
in the PNGs (`sdd.report.style`): a mode has its colour, marker and dash, so that none of them is needed alone. Values
are in percent.
"""

from typing import Any

from sdd.report.arms import Arm
from sdd.report.page.section import Subject
from sdd.report.style import MODES, OTHER, TINTS, looks, mixed

SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "D": "diamond",
    "P": "cross",
    "*": "M0,-1.1L0.26,-0.36L1.05,-0.34L0.42,0.14L0.65,0.89L0,0.44L-0.65,0.89L-0.42,0.14L-1.05,-0.34L-0.26,-0.36Z",
}
DARK_GROUND = "#15181D"
ON_DARK = {
    "teacher": "#E8E8E8",
    "pruned": "#A3A3A3",
    "sft": "#56B4E9",
    "self_distill": "#F5883D",
    "gold": "#2FC79E",
    "merged": "#E49CC6",
}


def dark_palette() -> dict[str, str]:
    """For every colour that `looks` gives, the one that stands out from a dark ground."""
    bases = {**{mode: look[0] for mode, look in MODES.items()}, "": OTHER[0]}
    return {
        mixed(colour, "#FFFFFF", tint): mixed(ON_DARK.get(mode, colour), DARK_GROUND, tint)
        for mode, colour in bases.items()
        for tint in TINTS
    }


def in_percent(value: dict[str, Any]) -> dict[str, float]:
    return {name: 100 * value[name] for name in ("mean", "low", "high")}


def record_of(subject: Subject, arm: Arm, **values: Any) -> dict[str, Any]:
    """A row of a chart; `evaluated` may be given as what else the arm's numbers are from."""
    seeds = ", ".join(map(str, arm.seeds)) or "none"
    about = {"seeds": seeds, "evaluated": " ".join(run.address for run in arm.runs)}
    return {"arm": arm.name, **about, **values, "href": f"#{subject.anchors[arm.name]}"}


class Look:
    """Encodings of the series of a chart: one legend of colour, marker and dash, unless an axis names the series."""

    def __init__(self, series: list[str], modes: list[str], legend: bool = True) -> None:
        import altair as alt

        found = looks(modes)
        dashes = [[1, 0] if look.line == "-" else list(look.line[1]) for look in found]

        def scale(values: list[Any]) -> Any:
            return alt.Scale(domain=series, range=values)

        kept: dict[str, Any] = {"title": None} if legend else {"legend": None}
        self.colour = alt.Color("series:N", scale=scale([look.colour for look in found]), **kept)
        self.shape = alt.Shape("series:N", scale=scale([SYMBOLS[look.marker] for look in found]), **kept)
        self.dash = alt.StrokeDash("series:N", title=None, scale=scale(dashes))


def tooltip_of(*first: tuple[str, str], form: str = ".1f") -> list[Any]:
    import altair as alt

    fields = [("arm", "arm"), *first, ("seeds", "seeds"), ("evaluated", "artifacts")]
    numeric = {"mean", "low", "high", "change", "saved", "across", "across_low", "across_high"}
    return [
        alt.Tooltip(name, type="quantitative", format=form, title=title)
        if name in numeric
        else alt.Tooltip(name, type="nominal", title=title)
        for name, title in fields
    ]


INTERVAL = (("low", "95% from"), ("high", "95% to"))


def finished(chart: Any, records: list[dict[str, Any]], height: int = 340, least: int = 0) -> dict[str, Any]:
    """The specification with its rows; the page sets the width, at least `least` pixels, into which all has to fit."""
    import altair as alt

    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec: dict[str, Any] = chart.properties(height=height, autosize=fit, usermeta={"least": least}).to_dict()
    return {**spec, "datasets": {**spec.get("datasets", {}), "rows": records}}


def rows_of_chart() -> Any:
    import altair as alt

    return alt.Chart(alt.NamedData("rows"))


def points_of(look: Look, x: Any, y: Any, tooltip: Any, size: int = 110) -> Any:
    """A marker for every row, in the series' colour and shape, which leads to the row's page."""
    marks = rows_of_chart().mark_point(filled=True, size=size, opacity=1)
    return marks.encode(x=x, y=y, color=look.colour, shape=look.shape, href="href:N", tooltip=tooltip)


def curves_of(look: Look, x: Any, title: str, *about: tuple[str, str], form: str = ".1f") -> Any:
    """Lines, whiskers and markers of `mean`, `low` and `high` over x."""
    import altair as alt

    y = alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False))
    rows = rows_of_chart()
    return alt.layer(
        rows.mark_line(strokeWidth=1.8).encode(x=x, y=y, color=look.colour, strokeDash=look.dash, detail="series:N"),
        rows.mark_rule(strokeWidth=1.3).encode(x=x, y=alt.Y("low:Q", title=title), y2="high:Q", color=look.colour),
        points_of(look, x, y, tooltip_of(*about, ("mean", title), *INTERVAL, form=form), size=95),
    )


def series_of(groups: dict[str, Any]) -> dict[str, float]:
    """How far each series is moved sideways, in steps about zero, so that whiskers do not cover each other."""
    return {name: number - (len(groups) - 1) / 2 for number, name in enumerate(groups)}
