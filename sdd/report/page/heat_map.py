"""The heat map of every criterion by which blocks were removed, with what was removed outlined."""

from collections.abc import Iterable
from typing import Any

from sdd.errors import UserError
from sdd.report.collect import read_cut
from sdd.report.library import Artifact
from sdd.report.page.marks import finished, rows_of_chart
from sdd.report.page.section import Chart, Section, Subject
from sdd.store.files import AGAIN, shown_json

MOST_HEAT_MAPS = 6
MOST_BLOCKS, MOST_SCORES = 500, 130_000
STEP = {"removed": int, "scores": [(float, None)]}
SCORES = {"metric": str, "num_blocks?": int, "num_texts?": (int, None), "distance?": {str: [(float, None)]}}
SCORES |= {"steps?": ([STEP], None)}
MOST_LABELLED_BLOCKS = 14
"""Up to as many blocks, the cells of the heat map have room for their numbers."""


def _used_scores(subject: Subject) -> dict[str, tuple[Artifact, dict[str, dict[str, Any]]]]:
    """Scores by address, each with `pruning.json` of the pruned models that were cut by them."""
    by_address: dict[str, tuple[Artifact, dict[str, dict[str, Any]]]] = {}
    bases = [subject.library.get(arm.run.base or "") for arm in subject.arms]
    upstream = [artifact for base in bases if base for artifact in subject.library.upstream(base)]
    for pruned in (artifact for artifact in upstream if artifact.stage == "pruned"):
        scores = subject.library.get(pruned.inputs.get("scores", ""))  # a repaired model has none: that below it has
        if scores and (scores.path / "scores.json").is_file():
            cuts = by_address.setdefault(scores.address, (scores, {}))[1]
            cuts[pruned.address] = read_cut(pruned.path / "pruning.json")
    return by_address


def _scores(artifact: Artifact) -> dict[str, Any]:
    path = artifact.path / "scores.json"
    scores: dict[str, Any] = shown_json(path, SCORES)
    rows = [*scores.get("distance", {}).values(), *(step["scores"] for step in scores.get("steps") or [])]
    numbered = all(size.isdecimal() and len(size) < 6 for size in scores.get("distance", {}))
    longest = max([scores.get("num_blocks", 0), *map(len, rows)])
    if not numbered or longest > MOST_BLOCKS or sum(map(len, rows)) > MOST_SCORES:
        raise UserError(f"{path} has scores of no model; {AGAIN}")
    return scores


def redundancy(subject: Subject) -> Section | None:
    """The heat map of every criterion by which blocks were removed, with what was removed."""
    used = [(scores, _scores(scores), cuts) for scores, cuts in _used_scores(subject).values()]
    blocks = [criterion for criterion in used if "distance" in criterion[1]]  # others score channels within blocks
    charts = [_heat_map(scores, content, list(cuts.values())) for scores, content, cuts in blocks[:MOST_HEAT_MAPS]]
    if not charts:
        return None
    more = f" {len(blocks) - len(charts)} more criteria are not drawn." if len(blocks) > len(charts) else ""
    channels = [content["metric"] for _, content, _ in used if "distance" not in content]
    if channels:
        more += f" Criteria of channels, which score no blocks, have no map: {', '.join(dict.fromkeys(channels))}."
    lead = "The score of removing blocks l to l + n - 1, for every first block l and number n: the darker, the less "
    lead += f"the model changes.{more}"
    return Section("redundancy", "Which blocks are redundant", lead, charts)


def _heat_map(scores: Artifact, content: dict[str, Any], cuts: Iterable[dict[str, Any]]) -> Chart:
    import altair as alt

    removed = [cut.get("removed_of_student") or cut["removed_blocks"] for cut in cuts if cut.get("removed_blocks")]
    spans = {(len(blocks), blocks[0]): blocks for blocks in removed}
    rows, steps = content["distance"], content.get("steps")
    if steps:  # block by block: row n has the scores from which the n-th was chosen
        rows = {str(number): step["scores"] for number, step in enumerate(steps, 1)}
        most = max(map(len, removed), default=0)
        spans = {(number, step["removed"]): [step["removed"]] for number, step in enumerate(steps[:most], 1)}
    labelled = content["num_blocks"] <= MOST_LABELLED_BLOCKS
    records = []
    for size, row in rows.items():
        order = sorted((start for start in range(len(row)) if row[start] is not None), key=lambda start: row[start])
        for start in sorted(order):
            score = row[start]
            blocks = spans.get((int(size), start))
            records.append(
                {
                    "first": start,
                    "size": int(size),
                    "score": score,
                    "text": f"{score:.2f}".removeprefix("0"),
                    "share": order.index(start) / max(1, len(order) - 1),
                    "removed": ", ".join(map(str, blocks)) if blocks else "",
                    "href": f"#artifact-{scores.address}",
                    "address": scores.address,
                }
            )
    first = "block" if steps else "first removed block"
    x = alt.X("first:O", title=first, axis=alt.Axis(labelAngle=0, grid=False, labelOverlap=True))
    y = alt.Y("size:O", title="blocks removed", sort="descending", axis=alt.Axis(grid=False, labelOverlap=True))
    colour = alt.Color(
        "share:Q",
        title="rank at its size",
        scale=alt.Scale(domain=[0, 1], range=["#0B3C5D", "#5A8FB0", "#C9D9E3", "#F3EFE6"]),
        legend=alt.Legend(values=[0, 1], labelExpr="datum.value == 0 ? 'most redundant' : 'least'", gradientLength=150),
    )
    titles = {"first": first, "size": "blocks removed", "removed": "removed", "address": "scores"}
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
    if steps:
        note = f"Row n: the scores, from {texts}, by which the n-th block was chosen. Outlined: what was removed."
    height = (24 if labelled else 12) * len(rows)
    least = 70 + (30 if labelled else 12) * content["num_blocks"]
    name = f"redundancy-{scores.address}"
    return Chart(name, f"Redundancy by {content['metric']}", note, finished(chart, records, height, least))
