"""Worker processes of a sweep end with it: joblib's own wait minutes for more of a sweep that was killed."""

import multiprocessing
import os
import threading
import time

LOOKED_AFTER = 1.0
"""Seconds between two looks."""


def end_with_sweep() -> None:
    """In a worker of joblib's, end as soon as the process that began it is gone; artifacts bear that at any time.

    It may be gone already: imports take long, and the first job lies in a queue that outlives the sweep.
    """
    name = "end-with-sweep"
    kind = type(multiprocessing.current_process()).__module__
    if ".loky." not in kind or name in (thread.name for thread in threading.enumerate()):
        return
    sweep = multiprocessing.parent_process()
    assert sweep is not None, "workers are begun by multiprocessing"

    def watch() -> None:
        while os.getppid() == sweep.pid:
            time.sleep(LOOKED_AFTER)
        os._exit(1)

    threading.Thread(target=watch, name=name, daemon=True).start()
