"""Evaluate the unpruned, pruned or fine-tuned model and print the folder of the results.

Usage: python evaluate.py --help
"""

import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
# lm-eval imports Hugging Face's `evaluate`, which this file's name would shadow: look here last.
sys.path[:] = [*(path for path in sys.path if path not in ("", HERE)), HERE]

if __name__ == "__main__":
    from sdd.cli.app import evaluate

    evaluate()
