"""`health.json` and `health.md`: how arms write, beside the unpruned model. `examined` says what a record holds."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdd.report import health
from sdd.report.contrasts import Study
from sdd.report.files import write
from sdd.report.tables import evaluation_of, markdown, percent
from sdd.untrusted import as_markdown

CRITERION = (
    f"An arm is marked where the whole 95% interval is on the worse side of the unpruned model's, and: a share of "
    f"answers is {100 * health.SHARE:.0f} points and {health.ITEMS} items above; answers are less than "
    f"{health.LENGTHS[0]:.2f} or more than {health.LENGTHS[1]:.2f} times as long; or more than "
    f"{100 * health.FLIPPED:.0f}% of the items went from right to wrong and as many from wrong to right. The average "
    f"hides it where it is {100 * health.FINE:.0f}% of the unpruned model's or more."
)
METHOD = (
    f"Percent of answers in the model's own words, means over tasks. Repeated: the answer ends in {health.COPIES} or "
    "more copies of the same characters. Cut: it fills the limit of generated tokens, counted anew from its text. "
    "Malformed: it ends without stating an answer in the form that the task wants. Length ratio: of words to the "
    "unpruned model's. Flips, right to wrong and back: percent of items scored right or wrong. Calibration error: of "
    "choices by likelihood, in ten bins of confidence. A dash: the evaluation cannot tell."
)
NO_SAMPLING = "pass@1 against pass@k is absent: every item was answered once, or its several answers have no scores."


def times(value: dict[str, Any] | None) -> str:
    """A ratio with its interval: '1.04 [0.98, 1.10]'."""
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]" if value else "-"


def health_cells(records: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A header, and a line for each arm."""
    header = ["arm", *health.RATES, "words", "length ratio", "right to wrong", "wrong to right"]
    header += ["calibration error", "worse than the unpruned model", "hidden by the average"]

    def cells(record: dict[str, Any]) -> list[str]:
        flips, calibration, words = record["flips"] or {}, record["calibration"], record["words"]
        return [
            record["arm"],
            *(percent(record[name]) for name in health.RATES),
            f"{words['mean']:.1f}" if words else "-",
            times(record["length"]),
            percent(flips.get("right_to_wrong")),
            percent(flips.get("wrong_to_right")),
            f"{100 * calibration['error']:.1f}" if calibration else "-",
            ", ".join(record["symptoms"]) or "-",
            "yes" if record["hidden"] else "-",
        ]

    return header, [cells(record) for record in records]


def damage(record: dict[str, Any]) -> str:
    """What an arm's answers are worse in, in words with their intervals."""
    parts = []
    for name in record["symptoms"]:
        if name in health.RATES:
            change = percent(record["changes"][name], signed=True)
            parts.append(f"{percent(record[name])} percent of its answers {health.RATES[name]} ({change} points)")
        elif name == "flips":
            broken, mended = (percent(record["flips"][way]) for way in ("right_to_wrong", "wrong_to_right"))
            parts.append(f"{broken} percent of the items went from right to wrong and {mended} from wrong to right")
        else:
            parts.append(f"its answers are {times(record['length'])} times as long")
    return "; ".join(parts)


def health_markdown(study: Study) -> str:
    lines = [METHOD, "", CRITERION, "", NO_SAMPLING, ""]
    for comparison in study.comparisons:
        records = [study.health[arm.name] for arm in comparison.arms]
        lines += [f"## Health ({as_markdown(evaluation_of(comparison))})", "", *markdown(*health_cells(records)), ""]
        worse = [record for record in records if record["symptoms"]]
        lines += [f"- {as_markdown(record['arm'])}: {damage(record)}." for record in worse] + ([""] if worse else [])
    return "\n".join(lines)


def write_health(study: Study, out: Path) -> None:
    """Write health.json and health.md."""
    content = {"method": METHOD, "criterion": CRITERION, "pass_at_k": None, "arms": list(study.health.values())}
    write(out / "health.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write(out / "health.md", health_markdown(study))
