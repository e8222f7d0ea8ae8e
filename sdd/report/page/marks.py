"""What the charts are made of: rows of arms, looks, points with whiskers, and the specification that comes of them.

Every mark that stands for an arm carries its name, its evaluated addresses and a link to how it was made. Arms look as
in the PNGs (`sdd.report.style`), so that no channel is needed alone. Values are in percent. A point is at `mean`, its
whisker from `low` to `high`; where both axes have a value, the other one's are `across`, `across_low`, `across_high`.
"""

from typing import Any

from sdd.finetuning.modes import SOLID
from sdd.report.arms import Arm
from sdd.report.page.section import Subject
from sdd.report.style import MODES, OTHER, TINTS, WHITE, looks, mixed

DARK_GROUND = "#15181D"
REFERENCE = "#888888"
"""Of what stands for no arm; legible on both grounds."""
ROW = 30
"""Pixels an arm, where arms stand below each other."""
INTERVAL = (("low", "95% from"), ("high", "95% to"))
ACROSS = (("across_low", "95% from"), ("across_high", "95% to"))


def dark_palette() -> dict[str, str]:
    """For every colour that `looks` gives, the one that stands out from a dark ground."""
    return {
        mixed(mode.colour, WHITE, tint): mixed(mode.on_dark, DARK_GROUND, 0.7 * tint)  # dark swallows more
        for mode in (*MODES.values(), OTHER)
        for tint in TINTS
    }


def glyph_rules() -> str:
    """CSS that shows a look's marker before the name of an arm."""
    named = [(f".glyph.look-{name}", mode) for name, mode in MODES.items()]
    return "".join(
        f'{selector}::before {{ content: "{mode.glyph}"; color: light-dark({mode.colour}, {mode.on_dark}); }}\n'
        for selector, mode in ((".glyph", OTHER), *named)
    )


def in_percent(value: dict[str, Any]) -> dict[str, float]:
    return {name: 100 * value[name] for name in ("mean", "low", "high")}


def record_of(subject: Subject, arm: Arm, **values: Any) -> dict[str, Any]:
    """A row of a chart; `evaluated` may be given as what else the arm's numbers are from."""
    seeds = ", ".join(map(str, arm.seeds)) or "none"
    about = {"seeds": seeds, "evaluated": " ".join(run.address for run in arm.runs)}
    return {"arm": arm.name, **about, **values, "href": f"#{subject.anchors[arm.name]}"}


def across(value: dict[str, Any]) -> dict[str, float]:
    """A mean with its interval as the columns of the other axis."""
    return {"across": value["mean"], "across_low": value["low"], "across_high": value["high"]}


def series_of(groups: dict[str, Any]) -> dict[str, float]:
    """How far each series is moved sideways, in steps about zero, so that whiskers do not cover each other."""
    return {name: number - (len(groups) - 1) / 2 for number, name in enumerate(groups)}


class Look:
    """Encodings of the series of a chart: one legend of colour and marker, unless an axis names the series."""

    def __init__(self, series: list[str], arms_look: list[str], legend: bool = True) -> None:
        import altair as alt

        styles = looks(arms_look)
        dashes = [[1, 0] if look.line == SOLID else list(look.line[1]) for look in styles]

        def scale(values: list[Any]) -> Any:
            return alt.Scale(domain=series, range=values)

        options: dict[str, Any] = {"title": None} if legend else {"legend": None}
        self.colour = alt.Color("series:N", scale=scale([look.colour for look in styles]), **options)
        self.shape = alt.Shape("series:N", scale=scale([look.symbol for look in styles]), **options)
        self.dash = alt.StrokeDash("series:N", title=None, scale=scale(dashes))


def numbered(subject: Subject, points: list[tuple[Arm, dict[str, Any]]]) -> tuple[Look, list[dict[str, Any]]]:
    """Rows of arms that are told apart by the number beside each mark, and their looks."""
    names = [f"{number}  {arm.name}" for number, (arm, _) in enumerate(points, 1)]
    records = [
        record_of(subject, arm, series=name, number=name.split()[0], **values)
        for name, (arm, values) in zip(names, points, strict=True)
    ]
    return Look(names, [arm.look for arm, _ in points]), records


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


def finished(chart: Any, records: list[dict[str, Any]], height: int = 340, least: int = 0) -> dict[str, Any]:
    """The specification with its rows; the page sets the width, at least `least` pixels, into which all has to fit."""
    import altair as alt

    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    spec: dict[str, Any] = chart.properties(height=height, autosize=fit, usermeta={"least": least}).to_dict()
    return {**spec, "datasets": {**spec.get("datasets", {}), "rows": records}}


def rows_of_chart() -> Any:
    import altair as alt

    return alt.Chart(alt.NamedData("rows"))


def arms_axis(field: str) -> Any:
    import altair as alt

    return alt.Y(f"{field}:N", title=None, sort=None, axis=alt.Axis(grid=False))


def _at(axis: Any, field: str) -> Any:
    """The same axis at another column."""
    other = axis.copy(deep=False)
    other.shorthand = f"{field}:Q"
    return other


def _whiskers(colour: Any, **ends: Any) -> Any:
    return rows_of_chart().mark_rule(strokeWidth=1.4).encode(**ends, color=colour)


def _points(look: Look, x: Any, y: Any, tooltip: list[Any]) -> Any:
    marks = rows_of_chart().mark_point(filled=True, size=105, opacity=1)
    return marks.encode(x=x, y=y, color=look.colour, shape=look.shape, href="href:N", tooltip=tooltip)


def curves_of(look: Look, x: Any, title: str, *about: tuple[str, str], form: str = ".1f") -> Any:
    """Lines, whiskers and markers over x."""
    import altair as alt

    y = alt.Y("mean:Q", title=title, scale=alt.Scale(zero=False))
    lines = rows_of_chart().mark_line(strokeWidth=1.8)
    return alt.layer(
        lines.encode(x=x, y=y, color=look.colour, strokeDash=look.dash, detail="series:N"),
        _whiskers(look.colour, x=x, y=_at(y, "low"), y2="high:Q"),
        _points(look, x, y, tooltip_of(*about, ("mean", title), *INTERVAL, form=form)),
    )


def arms_of(look: Look, field: str, title: str, *about: tuple[str, str], colour: Any = None) -> Any:
    """What a field names below each other: whiskers, of the series' colour unless given one, and markers, from zero."""
    import altair as alt

    x, y = alt.X("mean:Q", title=title, scale=alt.Scale(zero=True)), arms_axis(field)
    whiskers = _whiskers(colour or look.colour, x=_at(x, "low"), x2="high:Q", y=y)
    return alt.layer(whiskers, _points(look, x, y, tooltip_of(*about, form=".3f")))


def scatter_of(look: Look, x: Any, y: Any, text: str, *about: tuple[str, str], form: str = ".1f") -> Any:
    """Markers of two values with a text beside them; whiskers across only where `about` tells them."""
    import altair as alt

    layers = [_whiskers(look.colour, x=x, y=_at(y, "low"), y2="high:Q")]
    if set(ACROSS) <= set(about):
        layers.append(_whiskers(look.colour, x=_at(x, "across_low"), x2="across_high:Q", y=y))
    words = rows_of_chart().mark_text(dx=10, dy=-8, fontSize=11, fontWeight="bold").encode(x=x, y=y, text=f"{text}:N")
    return alt.layer(*layers, _points(look, x, y, tooltip_of(*about, form=form)), words)
