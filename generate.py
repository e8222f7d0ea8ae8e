"""Let the teacher rewrite the fine-tuning answers, select, and print the folder of the training targets.

Usage: python generate.py --help
"""

import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
# Hugging Face's `evaluate`, which lm-eval imports, must not be shadowed by evaluate.py: look here last.
sys.path[:] = [*(path for path in sys.path if path not in ("", HERE)), HERE]

if __name__ == "__main__":
    from sdd.cli.app import generate

    generate()
