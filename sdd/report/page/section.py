"""What the page is made of: sections with text, tables and charts, and the study that they are made from.

A section is made by a function of a `Subject` that returns None where the study has nothing for it. Text of sections is
escaped by the templates; only what a template rendered is taken as HTML.
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdd.report.arms import Arm
from sdd.report.contrasts import Study
from sdd.report.library import Library
from sdd.report.measures import Comparison

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification under a title and a line on how to read it; rows with an `arm` can be filtered."""

    name: str
    title: str
    note: str
    spec: dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the page. `data` is stored in the page under the section's anchor, for the script to read."""

    anchor: str
    title: str
    lead: str
    charts: list[Chart] = field(default_factory=list)
    body: "Markup | str" = ""
    data: Any = None


@dataclass(frozen=True)
class Subject:
    """The study, the artifacts that it was read from, and its rows by the names of the arms."""

    study: Study
    library: Library
    analyses: dict[str, list[dict[str, Any]]]
    """As `sdd.report.analyses.analyse` returns it."""

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["arm"]: row for row in self.study.rows}

    @cached_property
    def arms(self) -> list[Arm]:
        return [arm for comparison in self.study.comparisons for arm in comparison.arms]

    @cached_property
    def anchors(self) -> dict[str, str]:
        return {arm.name: f"arm-{number}" for number, arm in enumerate(self.arms, start=1)}

    @property
    def comparison(self) -> Comparison:
        """The largest one, which the charts show."""
        return self.study.comparisons[0]

    @cached_property
    def retained(self) -> list[Arm]:
        """Its arms of which the retention is known."""
        return [arm for arm in self.comparison.arms if (self.rows[arm.name]["retention"] or {}).get("ratio_of_means")]


@lru_cache(maxsize=1)
def templates() -> "Environment":
    """The page's templates; every value is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: Any) -> "Markup":
    from markupsafe import Markup

    return Markup(templates().get_template(template).render(**values))
