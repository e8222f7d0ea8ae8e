"""A bundle's study, repeated here: looked at, run job by job, its table and artifacts compared with the bundle's."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdd.errors import UserError
from sdd.share.bundle import take_out
from sdd.share.looking import MOST_LINES, Repeated, Study, described
from sdd.stages.__main__ import differing
from sdd.store.__main__ import flat
from sdd.store.files import shown_json
from sdd.store.store import is_place
from sdd.untrusted import ANY, printable

TABLE = [{"arm": str, "settings?": ANY}]
NOT_COMPARED = ("addresses", "settings")


def rerun_bundle(bundle: Path, typed: Sequence[str], out: Path | None) -> int:
    """Look at a bundle; where `out` is given, repeat it and write its report there. 0: all is as it was, 1: not."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return _rerun(bundle, Path(temporary), typed, out)
        except UserError as error:
            raise UserError(str(error).replace(f"{temporary}/", f"{bundle}: ")) from None


def _rerun(bundle: Path, folder: Path, typed: Sequence[str], out: Path | None) -> int:
    take_out(bundle, folder)
    study = Study(folder)
    jobs = [study.repeated(number, typed, dry=out is None) for number in range(len(study.facts["jobs"]))]
    lines, same = described(study, jobs)
    _say(lines)
    if out is None:
        _say(["add --yes to repeat it"])
        return 0 if same else 1
    return _repeat(study, jobs, out)


def _say(lines: Sequence[str]) -> None:
    print("\n".join(map(printable, lines)), flush=True)


def _repeat(study: Study, jobs: list[Repeated], out: Path) -> int:
    folders = []
    for number, job in enumerate(jobs):
        print(f"job {number} of {len(jobs)}", file=sys.stderr)
        folders.append(job.job.build(job.wanted, job.script))
    unlike = _unlike_artifacts(study, jobs)
    lines = [f"artifacts: {sum(not files for files in unlike.values())} of {len(unlike)} are the same to the byte"]
    lines += [f"  {name}: {files[0]}" for name, files in unlike.items() if files][:MOST_LINES]
    table = study.folder / "report" / "table.json"
    changed: list[str] = []
    if table.exists():
        from sdd.report import write_report

        evaluated = [folder for folder in folders if folder.parent.name == "evaluated"]
        written = write_report(evaluated, folders[0].parent.parent, out)
        if written is None:
            raise UserError("the bundle has a table, and none of its jobs evaluates anything")
        changed = table_differences(shown_json(table, TABLE), shown_json(written / "table.json", TABLE))
        lines.append("table: " + (f"{len(changed)} values differ (there | here):" if changed else "the same"))
        lines += [f"  {line}" for line in changed[:MOST_LINES]]
    _say([*lines, str(out)] if table.exists() else lines)
    return 1 if changed or any(unlike.values()) else 0


def _unlike_artifacts(study: Study, jobs: Sequence[Repeated]) -> dict[str, list[str]]:
    """For every artifact that the bundle has a manifest of and that is here: what of its files differs."""
    unlike = {}
    for job in jobs:
        for recipe in job.wanted.walk():
            folder, manifest = job.job.root / recipe.stage / recipe.address, study.manifests.get(recipe.address)
            if manifest is not None and is_place(folder):
                unlike[f"{recipe.stage}/{recipe.address}"] = differing(manifest["files"], folder)
    return unlike


def table_differences(recorded: list[dict[str, Any]], own: list[dict[str, Any]]) -> list[str]:
    """Every value in which two tables differ, by arm."""
    before, after = ({row["arm"]: row for row in rows} for rows in (recorded, own))
    lines = [f"{arm}: only there" for arm in before if arm not in after]
    lines += [f"{arm}: only here" for arm in after if arm not in before]
    for arm in before:
        if arm in after:
            one, other = (
                flat({k: v for k, v in rows[arm].items() if k not in NOT_COMPARED}) for rows in (before, after)
            )
            keys = sorted(one.keys() | other.keys())
            lines += [f"{arm}: {k}: {one.get(k)} | {other.get(k)}" for k in keys if one.get(k) != other.get(k)]
    return lines
