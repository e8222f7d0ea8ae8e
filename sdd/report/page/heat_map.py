"""The heat map of every criterion by which blocks were removed, with what was removed outlined."""

from collections.abc import Iterable
from typing import Any

from sdd.report.library import Artifact, read_json
from sdd.report.page.marks import finished, rows_of_chart
from sdd.report.page.section import Chart, Section, Subject

MOST_HEAT_MAPS = 6
MOST_LABELLED_BLOCKS = 14
"""Up to as many blocks, the cells of the heat map have room for their numbers."""


def _used_scores(subject: Subject) -> dict[str, tuple[Artifact, dict[str, dict[str, Any]]]]:
    """Scores by address, each with `pruning.json` of the pruned models that were cut by them."""
    found: dict[str, tuple[Artifact, dict[str, dict[str, Any]]]] = {}
    for arm in subject.arms:
        pruned = subject.library.get(arm.run.base or "")
        scores = subject.library.get(pruned.inputs.get("scores", "")) if pruned else None
        if pruned and scores and (scores.path / "scores.json").is_file():
            cuts = found.setdefault(scores.address, (scores, {}))[1]
            cuts[pruned.address] = read_json(pruned.path / "pruning.json")
    return found


def redundancy(subject: Subject) -> Section | None:
    """The heat map of every criterion by which blocks were removed, with what was removed."""
    charts: list[Chart] = []
    used = list(_used_scores(subject).values())
    for scores, cuts in used:
        content = read_json(scores.path / "scores.json")
        if "distance" in content and len(charts) < MOST_HEAT_MAPS:
            charts.append(_heat_map(scores, content, list(cuts.values())))
    if not charts:
        return None
    more = f" {len(used) - len(charts)} more criteria are not drawn." if len(used) > len(charts) else ""
    lead = "The score of removing blocks l to l + n - 1, for every first block l and number n: the darker, the less "
    lead += f"the model changes.{more}"
    return Section("redundancy", "Which blocks are redundant", lead, charts)


def _heat_map(scores: Artifact, content: dict[str, Any], cuts: Iterable[dict[str, Any]]) -> Chart:
    import altair as alt

    removed = [cut["removed_blocks"] for cut in cuts if cut.get("removed_blocks")]
    spans = {(len(blocks), blocks[0]): blocks for blocks in removed}
    labelled = content["num_blocks"] <= MOST_LABELLED_BLOCKS
    records = []
    for size, row in content["distance"].items():
        order = sorted(range(len(row)), key=lambda start: row[start])
        for start, score in enumerate(row):
            blocks = spans.get((int(size), start))
            records.append(
                {
                    "first": start,
                    "size": int(size),
                    "score": score,
                    "text": f"{score:.2f}".removeprefix("0"),
                    "share": order.index(start) / max(1, len(row) - 1),
                    "removed": ", ".join(map(str, blocks)) if blocks else "",
                    "href": f"#artifact-{scores.address}",
                    "address": scores.address,
                }
            )
    x = alt.X("first:O", title="first removed block", axis=alt.Axis(labelAngle=0, grid=False, labelOverlap=True))
    y = alt.Y("size:O", title="blocks removed", sort="descending", axis=alt.Axis(grid=False, labelOverlap=True))
    colour = alt.Color(
        "share:Q",
        title="rank at its size",
        scale=alt.Scale(domain=[0, 1], range=["#0B3C5D", "#5A8FB0", "#C9D9E3", "#F3EFE6"]),
        legend=alt.Legend(values=[0, 1], labelExpr="datum.value == 0 ? 'most redundant' : 'least'", gradientLength=150),
    )
    titles = {"first": "first removed block", "size": "blocks removed", "removed": "removed", "address": "scores"}
    tooltip = [alt.Tooltip(name, type="nominal", title=title) for name, title in titles.items()]
    tooltip.insert(2, alt.Tooltip("score:Q", format=".4f", title="score"))
    dark = alt.condition("datum.share < 0.45", alt.value("white"), alt.value("#222222"))
    layers = [
        rows_of_chart().mark_rect(stroke="white", strokeWidth=0.5).encode(x=x, y=y, color=colour, tooltip=tooltip)
    ]
    if labelled:
        layers.append(
            rows_of_chart().mark_text(fontSize=10.5).encode(x=x, y=y, text="text:N", color=dark, tooltip=tooltip)
        )
    chosen = (
        rows_of_chart().transform_filter("datum.removed != ''").mark_rect(filled=False, stroke="#D55E00", strokeWidth=3)
    )
    layers.append(chosen.encode(x=x, y=y, tooltip=tooltip, href="href:N"))
    chart = alt.layer(*layers).resolve_scale(color="independent")
    texts = f"{content['num_texts']} texts" if content.get("num_texts") else "no texts"
    contiguous = all(blocks == list(range(blocks[0], blocks[0] + len(blocks))) for blocks in spans.values())
    cut = (
        "first block of the span that was removed"
        if contiguous
        else "blocks were removed from here, not only in a span"
    )
    note = f"Coloured by rank among spans of one size; scores from {texts}. Outlined: {cut}."
    height = (24 if labelled else 12) * len(content["distance"])
    least = 70 + (30 if labelled else 12) * content["num_blocks"]
    name = f"redundancy-{scores.address}"
    return Chart(name, f"Redundancy by {content['metric']}", note, finished(chart, records, height, least))
