"""`report.html`: the study as one page that opens from disk, without a network and without a server.

    sections        functions of the study, a file a kind; what finds nothing is absent
    page.html       the templates; they escape every value, since prompts and answers may hold anything
    page.js         sorts, filters, draws the charts and browses the samples
    Vega            drawn by the library's own script, copied into the page

The page may run nothing but its own two scripts: a content security policy names them by their hashes and forbids
connections. Vega's expressions are interpreted, not compiled, because the policy forbids that too.
"""

import base64
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdd.report.contrasts import Study
from sdd.report.files import write
from sdd.report.library import Library
from sdd.report.page import charts, costs, health, heat_map, merging, samples, shift, speculative, words
from sdd.report.page.marks import dark_palette, glyph_rules
from sdd.report.page.section import FOLDER, Section, Subject, render

SECTIONS: tuple[Callable[[Subject], Section | None], ...] = (
    words.in_words,
    words.compared,
    words.arms_table,
    words.differences,
    health.health,
    charts.retention,
    charts.gain,
    merging.merging,
    costs.cost,
    speculative.speculative,
    shift.shift,
    charts.scaling,
    heat_map.redundancy,
    samples.answers,
    samples.rewrites,
    words.provenance,
)
"""In the order of the page."""


@lru_cache(maxsize=1)
def vega() -> str:
    """Vega, Vega-Lite and the embedder as one script that sets `vegaEmbed`."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle(vl_version=version)  # type: ignore[call-arg]  # its default is not in the stub
    return script


def write_page(study: Study, library: Library, analyses: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Write `report.html` of a study and the analyses of its students into a folder."""
    write(out / "report.html", page(Subject(study, library, analyses)))


def page(subject: Subject) -> str:
    sections = [section for make in SECTIONS if (section := make(subject)) is not None]
    scripts = [vega(), (FOLDER / "page.js").read_text(encoding="utf-8")]
    style = (FOLDER / "page.css").read_text(encoding="utf-8") + glyph_rules()
    arms = [{"name": arm.name, "look": arm.look, **words.dimensions(arm)} for arm in subject.arms]
    data: dict[str, Any] = {"arms": arms, "dark": dark_palette()}
    data["charts"] = {chart.name: chart.spec for section in sections for chart in section.charts}
    data |= {section.anchor: section.data for section in sections if section.data is not None}
    return str(
        render(
            "page.html",
            model=words.model_name(subject),
            sections=sections,
            choices=words.choices(subject),
            dimensions=words.DIMENSIONS,
            arms=len(subject.arms),
            policy=policy(scripts, style),
            style=trusted(style),
            scripts=[trusted(script) for script in scripts],
            data=trusted(embedded(data)),
        )
    )


def trusted(text: str) -> Any:
    """Text that is part of this program, or that `embedded` made harmless; it must not end its element."""
    from markupsafe import Markup

    assert "</script" not in text.lower() and "</style" not in text.lower()
    return Markup(text)


def embedded(data: Any) -> str:
    """JSON that no text in it can break out of a script element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(character, escape)
    return text


def policy(scripts: list[str], style: str) -> str:
    """A content security policy under which only these scripts and this style count."""

    def hash_source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = " ".join(map(hash_source, scripts))
    parts = ["default-src 'none'", f"script-src {allowed}", f"style-src {hash_source(style)}"]
    return "; ".join([*parts, "img-src data: blob:", "base-uri 'none'", "form-action 'none'"])
