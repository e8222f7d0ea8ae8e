"""Worker processes of a sweep end with it: joblib's own wait minutes for more of a sweep that was killed."""

import multiprocessing
import os
import threading
import time
from functools import partial

LOOKED_AFTER = 1.0
"""Seconds between two looks."""


def watched_workers() -> None:
    """From here on joblib's workers watch this process before they read anything from it.

    Later is too late: one that is given a long job when this process is killed would wait for the rest of it for ever,
    since it holds the other end of that pipe itself.
    """
    from joblib import register_parallel_backend  # type: ignore[import-untyped]
    from joblib.parallel import LokyBackend  # type: ignore[import-untyped]

    register_parallel_backend("loky", partial(LokyBackend, initializer=end_with_sweep))


def end_with_sweep() -> None:
    """In a worker of joblib's, end as soon as the process that began it is gone; artifacts bear that at any time."""
    sweep = multiprocessing.parent_process()
    assert sweep is not None, "workers are begun by multiprocessing"

    def watch() -> None:
        while os.getppid() == sweep.pid:
            time.sleep(LOOKED_AFTER)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-sweep", daemon=True).start()
