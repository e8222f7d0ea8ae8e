"""The command `python -m sdd.report FOLDER [FOLDER ...] --out DIR [--baseline SETTING=VALUE ...]`.

The table goes to stderr; the folder of the report is the last line of stdout.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdd.errors import UserError
from sdd.untrusted import printable, tell_error

MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RecursionError)
"""What reading an artifact ends in that has another form than its stage writes, beyond what is checked on reading."""
BUILD_ONE = "run `python evaluate.py` first, or give another folder"


def report(folders: list[Path], out: Path, baselines: Sequence[str] = ()) -> Path:
    """Find the evaluated artifacts of the folders, with the analyses that a sweep asked for, and write their report."""
    from sdd.report import write_report
    from sdd.report.library import find_analyses, find_evaluated

    evaluated = [path for folder in folders for path in find_evaluated(folder)]
    names = ", ".join(str(folder) for folder in folders)
    if not evaluated:
        raise UserError(f"no evaluated artifacts in {names}; {BUILD_ONE}")
    analyses = [path for folder in folders for path in find_analyses(folder)]
    written = write_report([*evaluated, *analyses], evaluated[0].parent.parent, out, baselines)
    if written is None:
        raise UserError(f"no evaluated artifact in {names} can be read together with its inputs; {BUILD_ONE}")
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sdd.report",
        description="Put the arms of a study side by side: tables (JSON, Markdown, CSV, LaTeX), plots and report.html.",
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="a folder of artifacts, or the folder of a sweep"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write the report")
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="SETTING=VALUE",
        help="also contrast every arm with the one that has this value and is otherwise the same, such as "
        "metric=magnitude or adapter.rank=16; may be given more than once",
    )
    parser.add_argument("--debug", action="store_true", help="show where a file that is not as it should be is read")
    options = parser.parse_args(arguments)
    try:
        written = report(options.folders, options.out, options.baseline)
    except (UserError, OSError) as error:
        return tell_error(error)
    except MALFORMED as error:
        if options.debug:
            raise
        message = printable(f"{type(error).__name__}: {error}".splitlines()[0][:200])
        print(f"error: an artifact is not as its stage writes it ({message}); --debug shows where", file=sys.stderr)
        return 2
    lines = (written / "table.md").read_text(encoding="utf-8").splitlines()
    print("\n".join(map(printable, lines)), file=sys.stderr)
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
