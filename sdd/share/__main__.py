"""The commands `python -m sdd.share FOLDER --out FILE` and `python -m sdd.share rerun FILE`."""

import sys

from sdd import share


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return share.rerun(words[1:]) if words[:1] == ["rerun"] else share.main(words)


if __name__ == "__main__":
    sys.exit(main())
