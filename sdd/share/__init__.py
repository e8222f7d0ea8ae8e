"""A study as one file: what was asked, what it was made of and what came out; and the study repeated from such a file.

    python -m sdd.share FOLDER --out study.zip [--weights]
    python -m sdd.share rerun study.zip [OVERRIDE ...] [--yes]

`gathering` turns the folder of a sweep, or of a report, into members; `bundle` writes and reads the file; `looking`
says what of it can be repeated here, `repeating` does so and compares. The file of somebody else is data: it says
nothing that a config file may not say.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from sdd.errors import UserError
from sdd.untrusted import tell_error


def main(argv: list[str] | None = None) -> int:
    """Write the bundle of a folder; its path is the last line of stdout."""
    parser = argparse.ArgumentParser(
        prog="python -m sdd.share", description="Write a study as one file: configs, tables, page, manifests, versions."
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of a sweep, or of a report above sweeps")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the file to write, such as study.zip")
    parser.add_argument("--weights", action="store_true", help="with all files of the artifacts, checkpoints included")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="CLASS", help="import path of a class of yours in its configs"
    )
    options = parser.parse_args(argv)

    def write() -> int:
        from sdd.share.bundle import write_bundle
        from sdd.share.gathering import members_of

        members = members_of(options.folder, options.allow, options.weights)
        write_bundle(options.out, members)
        print(f"{len(members)} files", file=sys.stderr)
        print(options.out)
        return 0

    return _explained(write)


def rerun(argv: list[str] | None = None) -> int:
    """Say what of a bundle can be repeated here, and with --yes repeat it.

    Exit code 0: everything is as it was; 1: something differs; 2: it cannot be repeated, and a line says why.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sdd.share rerun", description="Look at a study's file; with --yes, repeat it and compare."
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="what python -m sdd.share wrote")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="OVERRIDE",
        help="what every job is told besides: your places (model.path=..., paths.artifacts=...), trainer=gpu",
    )
    parser.add_argument("--yes", action="store_true", help="really run its jobs; without, nothing is fetched or built")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the new report goes (outputs/rerun/BUNDLE)")
    options = parser.parse_intermixed_args(argv)

    def look() -> int:
        from sdd.share.repeating import rerun_bundle

        out = options.out or Path("outputs", "rerun", options.bundle.stem)
        return rerun_bundle(options.bundle, options.overrides, out if options.yes else None)

    return _explained(look)


def _explained(run: Callable[[], int]) -> int:
    try:
        return run()
    except (UserError, OSError) as error:
        return tell_error(error)


__all__ = ["main", "rerun"]
