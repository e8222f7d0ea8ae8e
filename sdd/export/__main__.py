"""`python -m sdd.export`: see `sdd.export.checkpoint`."""

import sys

from sdd.export.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
