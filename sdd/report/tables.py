"""The tables of a report: `table.json` and `contrasts.json` for programs, `table.csv` for spreadsheets, `table.md`.

Scores are shares in [0, 1] in the files for programs and percent in `table.md`. Numbers are never rounded in JSON.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdd.planning.requirements import flops
from sdd.report.arms import text_of
from sdd.report.contrasts import Study
from sdd.report.files import write
from sdd.report.measures import Comparison
from sdd.untrusted import as_markdown

METHOD = (
    "Percent; in brackets 95% intervals over seeds and items, from their components of variance (arms without seeds or "
    "with one: items only); differences are paired by seed and item. They do not cover another unpruned or pruned "
    "model or other tasks, and are not corrected for many comparisons. "
    "Average: unweighted mean over tasks. Retention: average / average of the unpruned model. "
    "Recovery, FLOPs: of the student, in training and writing, + of the unpruned model, beside it or for its targets."
)
FORMULA = tuple("=+-@\uff1d\uff0b\uff0d\uff20")
"""What a formula begins with in one spreadsheet or another."""
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")
SHOWN = ("average", "trained_on", "not_trained_on", "retention", "nll")
MOST_CONTRASTS = 60
PRICE = "recovery, FLOPs"


def percent(value: dict[str, Any] | None, signed: bool = False) -> str:
    """A share with its interval in percent: '61.2 [58.0, 64.1]'."""
    if not value:
        return "-"
    sign = "+" if signed else ""
    mean, low, high = (f"{100 * value[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def nats(value: dict[str, Any] | None, signed: bool = False) -> str:
    """Nats per token with their interval."""
    if not value:
        return "-"
    sign = "+" if signed else ""
    return f"{value['mean']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def priced(value: dict[str, float] | None) -> str:
    """FLOPs of the student and of the unpruned model: '142 G + 244 G'."""
    return "-" if value is None else flops(value["student"], value["teacher"])


def without_empty(header: list[str], rows: Iterable[list[str]]) -> list[list[str]]:
    """The header and the lines without the columns in which no line has anything."""
    body = list(rows)
    columns = [i for i in range(len(header)) if i == 0 or any(row[i] not in ("-", "") for row in body)]
    return [[row[i] for i in columns] for row in [header, *body]]


def markdown(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Lines of a table, columns padded so that it reads as plain text too; empty columns are dropped."""
    cells = [[as_markdown(cell) for cell in row] for row in without_empty(header, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in cells]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return lines


def _seeds(seeds: list[int]) -> str:
    return " ".join(map(str, seeds)) or "-"


def arm_cells(rows: list[dict[str, Any]], health: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A header, and a line for each arm; the last column names what its average hides."""
    header = ["arm", "seeds", "average", "retention", "mean of ratios", "trained on", "not trained on"]
    header += ["nll (nats per token)", "parameters", "FLOPs saved", PRICE, "hidden damage"]

    def cells(row: dict[str, Any]) -> list[str]:
        retention = row["retention"] or {}
        return [
            row["arm"],
            _seeds(row["seeds"]),
            percent(row["average"]),
            percent(retention.get("ratio_of_means")),
            percent(retention.get("mean_of_ratios")),
            percent(row["trained_on"]),
            percent(row["not_trained_on"]),
            nats(row["nll"]),
            "-" if row["parameters"] is None else f"{row['parameters']:,}",
            "-" if row["flops_saved"] is None else f"{100 * row['flops_saved']:.1f}",
            priced(row["price"]),
            hidden_damage(health[row["arm"]]),
        ]

    return header, [cells(row) for row in rows]


def hidden_damage(record: dict[str, Any]) -> str:
    """Names of the symptoms that a fine average hides; "-" where it hides none."""
    return ", ".join(record["symptoms"]) if record["hidden"] else "-"


def _answers_table(rows: list[dict[str, Any]], tasks: list[str]) -> list[str]:
    """Strict / lenient / malformed, for tasks with free-form answers."""
    free = [task for task in tasks if any("lenient" in row["tasks"][task] for row in rows)]

    def cell(task: dict[str, Any]) -> str:
        names = [name for name in ("mean", "lenient", "malformed") if name in task]
        return " / ".join(f"{100 * task[name]:.1f}" for name in names)

    return (
        markdown(["arm", *free], [[row["arm"], *(cell(row["tasks"][task]) for task in free)] for row in rows])
        if free
        else []
    )


def pairs_of(contrasts: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """Differences between comparable arms by pair, then by measure."""
    pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in contrasts:
        if row["comparable"]:
            pairs.setdefault((row["a"], row["b"]), {})[row["measure"]] = row
    return pairs


def own_settings(by_measure: dict[str, dict[str, Any]]) -> str:
    """What two arms have each at its own, by short names; "" where their settings are equal."""
    return ", ".join(name.rpartition(".")[2].replace("_", " ") for name in by_measure["average"]["settings_differ"])


def contrast_cells(contrasts: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A header, and a line for each pair of comparable arms."""
    header = ["difference", "seeds", "each at its own", "average", "trained on", "not trained on", "retention"]
    header += ["nll (lower is better)"]
    lines = []
    for (a, b), by in pairs_of(contrasts).items():
        cells = [(nats if name == "nll" else percent)(by.get(name), signed=True) for name in SHOWN]
        lines.append([f"{a} - {b}", _seeds(by["average"]["seeds"]), own_settings(by), *cells])
    return header, lines


def _contrast_tables(contrasts: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Titles and tables: what is always contrasted, then what each baseline asked for."""
    tables = []
    for baseline in dict.fromkeys(["", *(row["baseline"] for row in contrasts)]):
        header, lines = contrast_cells([row for row in contrasts if row["baseline"] == baseline])
        most = len(lines) if baseline else MOST_CONTRASTS
        table = markdown(header, lines[:most]) if lines else []
        if len(lines) > most:
            table.append(f"\n{len(lines) - most} more in `contrasts.json`.")
        tables.append((f"Differences to {as_markdown(baseline)}, paired" if baseline else "Differences, paired", table))
    return tables


def evaluation_of(comparison: Comparison) -> str:
    """What was evaluated, in a line: the split and the number of items."""
    sizes = sorted(set(comparison.items.values()))
    items = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    split = comparison.arms[0].run.settings.get("evaluation.split")
    return f"{len(comparison.tasks)} tasks, {items} items each" + (f", split {text_of(split)}" if split else "")


def table_markdown(study: Study, findings: Sequence[str], next_steps: Sequence[str]) -> str:
    """The report to read: notes, for each evaluation arms, tasks and differences; what to try next; the findings."""
    lines = [METHOD, "", *(f"Note: {_note(note)}" for note in study.notes), *([""] if study.notes else [])]
    by_name = {row["arm"]: row for row in study.rows}
    for comparison in study.comparisons:
        rows = [by_name[arm.name] for arm in comparison.arms]
        names = {arm.name for arm in comparison.arms}
        tasks = [[row["arm"], *(percent(row["tasks"][task]) for task in comparison.tasks)] for row in rows]
        sections = [
            (f"Arms ({as_markdown(evaluation_of(comparison))})", markdown(*arm_cells(rows, study.health))),
            ("Tasks", markdown(["arm", *comparison.tasks], tasks)),
            ("Free-form answers: strict / lenient / malformed endings", _answers_table(rows, comparison.tasks)),
            *_contrast_tables([row for row in study.contrasts if row["a"] in names]),
        ]
        for title, table in sections:
            if table:
                lines += [f"## {title}", "", *table, ""]
    for title, sentences in (("What to try next", next_steps), ("In words", findings)):
        lines += [f"## {title}", "", *(f"- {as_markdown(sentence)}" for sentence in sentences), ""] if sentences else []
    return "\n".join(lines)


def _note(note: str) -> str:
    """A note of this program's, in which names of others stand; its own code marks stay."""
    return " ".join(note.split()).replace("<", "&lt;").replace("](", "]\\(")


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """One row for a spreadsheet: intervals as three columns, lists joined by spaces."""
    flat: dict[str, Any] = {}

    def put(name: str, value: dict[str, Any] | None) -> None:
        for key, number in (value or {}).items():
            flat[name if key == "mean" else f"{name}_{key}"] = number

    for name in ("arm", "finetune", "metric", "pruning", "dataset", "merge"):
        flat[name] = row[name]
    flat["settings"] = "; ".join(f"{name}={text_of(value)}" for name, value in row["settings"].items())
    flat["seeds"] = " ".join(map(str, row["seeds"]))
    put("average", row["average"])
    for name, value in (row["retention"] or {}).items():
        put(f"retention_{name}", value)
    for name in ("trained_on", "not_trained_on", "nll"):
        put(name, row[name])
    flat.update(parameters=row["parameters"], flops_saved=row["flops_saved"])
    flat |= {f"price_{name}": flops for name, flops in (row["price"] or {}).items()}
    for task, value in row["tasks"].items():
        put(f"task_{task}", value)
    flat["addresses"] = " ".join(row["addresses"])
    return flat


def inert(value: Any) -> Any:
    """A cell that a spreadsheet does not take for a formula; numbers stay numbers."""
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return "" if value is None else value
    return f"'{value}" if value.lstrip().startswith(FORMULA) or value.startswith(("\t", "\r", "\n")) else value


def write_tables(study: Study, findings: Sequence[str], next_steps: Sequence[str], out: Path) -> None:
    """Write table.json, contrasts.json, table.csv and table.md."""
    for name, content in (("table.json", study.rows), ("contrasts.json", study.contrasts)):
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str)
        write(out / name, text + "\n")
    flat = [_flat(row) for row in study.rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(map(inert, columns))
    writer.writerows([inert(row.get(name)) for name in columns] for row in flat)
    write(out / "table.csv", file.getvalue())
    write(out / "table.md", table_markdown(study, findings, next_steps))
