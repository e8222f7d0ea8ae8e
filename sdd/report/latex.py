"""`table.tex` and `contrasts.tex`: the tables of `tables` for a paper, in the style of booktabs.

Each is a `tabular` to be set with `\\input` inside a table of one's own; the document needs `\\usepackage{booktabs}`.
The interval is the small text after a number, which is in percent unless its column says otherwise.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from sdd.report.contrasts import Study
from sdd.report.files import write
from sdd.report.tables import arm_cells, contrast_cells, evaluation_of, without_empty

SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
NUMBER = re.compile(r"([+-]?[\d.,]+)(?: (\[[-+\d., ]*\]))?")


def escaped(text: str) -> str:
    text = " ".join(text.split())
    return "".join(SPECIAL.get(character, character) for character in text)


def comment(text: str) -> str:
    """One line, in which `^^M`, TeX's other way to end it, cannot stand."""
    return f"% {' '.join(text.split())}".replace("^^", "^ ^")


def cell(text: str) -> str:
    """A number with a true minus and its interval made small; any other text escaped."""
    number = NUMBER.fullmatch(text)
    if number is None:
        return "--" if text == "-" else escaped(text)
    value, interval = (re.sub(r"-(?=\d)", "$-$", part or "") for part in number.groups())
    return f"{value} {{\\footnotesize {interval}}}" if interval else value


def tabular(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    first, *body = without_empty(header, rows)
    lines = [[escaped(name) for name in first], *([escaped(row[0]), *map(cell, row[1:])] for row in body)]
    head, *rest = (f"{' & '.join(line)} \\\\" for line in lines)
    columns = "l" * (2 if "seeds" in first else 1)
    columns = columns.ljust(len(first), "r")
    return [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rest, r"\bottomrule", r"\end{tabular}"]


def write_latex(study: Study, out: Path) -> None:
    """Write table.tex and contrasts.tex, a tabular for each evaluation; the second only where arms were contrasted."""
    by_name = {row["arm"]: row for row in study.rows}
    arms: list[str] = []
    contrasts: list[str] = []
    for comparison in study.comparisons:
        names = {arm.name for arm in comparison.arms}
        about = comment(evaluation_of(comparison))
        tasks = [task.replace("_", " ") for task in comparison.tasks]
        arms += [about, *tabular(*arm_cells([by_name[arm.name] for arm in comparison.arms], study.health)), ""]
        pairs = contrast_cells([row for row in study.contrasts if row["a"] in names])
        contrasts += [about, comment(f"tasks: {', '.join(tasks)}"), *tabular(*pairs), ""] if pairs[1] else []
    for name, lines in (("table.tex", arms), ("contrasts.tex", contrasts)):
        write(out / name, "\n".join(lines))
