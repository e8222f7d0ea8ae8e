"""`python -m sdd`: see `sdd.cli.program`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Hugging Face's `evaluate`, which lm-eval imports, must not be shadowed by an evaluate.py here: look here last.
    here = [path for path in sys.path if path == "" or Path(path).resolve() == Path.cwd().resolve()]
    sys.path[:] = [*(path for path in sys.path if path not in here), *here]

    from sdd.cli.program import main

    sys.exit(main())
