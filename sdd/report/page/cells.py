"""Cells and lines of the page's tables: a number as text, its interval under it, and the number itself to sort by."""

from typing import Any

from sdd.report.arms import Arm
from sdd.report.collect import spans
from sdd.report.page.section import Subject


def cell(value: dict[str, Any] | None, digits: int = 1, scale: float = 100, signed: bool = False) -> dict[str, Any]:
    """A mean with its interval; without other word, a share in percent."""
    if not value:
        return plain("–", None)
    sign = "+" if signed else ""
    mean, *ends = (f"{scale * value[name]:{sign}.{digits}f}" for name in ("mean", "low", "high"))
    sure = ("above" if value["mean"] > 0 else "below") if signed and value["low"] * value["high"] > 0 else ""
    return {"text": mean, "span": f"[{', '.join(ends)}]", "order": value["mean"], "sure": sure}


def plain(text: str, order: float | None, span: str = "") -> dict[str, Any]:
    return {"text": text, "span": span, "order": order, "sure": ""}


def columns(lines: list[dict[str, Any]]) -> list[str]:
    """Columns in which any line has a number."""
    names = dict.fromkeys(name for line in lines for name in line["cells"])
    return [name for name in names if any(line["cells"].get(name, {}).get("order") is not None for line in lines)]


def line_of(
    subject: Subject, arm: Arm, cells: dict[str, dict[str, Any]], about: str = "", seeds: list[int] | None = None
) -> dict[str, Any]:
    """A line of a table; `about` tells lines of one arm apart, `seeds` are those measured, if not all of the arm's."""
    own = {"arm": arm.name, "anchor": subject.anchors[arm.name], "about": about, "look": arm.look}
    return {**own, "seeds": spans(arm.seeds if seeds is None else seeds) or "–", "cells": cells}


def table(title: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A table of `table.html`; a line without a number of a column has a dash there."""
    names = columns(lines)
    for line in lines:
        line["cells"] = {name: line["cells"].get(name) or plain("–", None) for name in names}
    return {"title": title, "lines": lines, "columns": names}
