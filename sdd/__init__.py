"""What holds in every process: the package `kernels` is not there, through which libraries fetch and run hub code."""

import sys

sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
