"""The public data files beside the checkout: where they are, and the skip where they are not."""

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ROWS = DATA / "eval"
STORIES = DATA / "models" / "stories260K" / "hf"

needs_data = pytest.mark.skipif(not STORIES.is_dir(), reason=f"no public data files at {DATA}")
