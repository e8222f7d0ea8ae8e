"""How long a sweep takes where several workers share its jobs, from what each artifact takes."""

import heapq
from collections.abc import Sequence

Step = tuple[str, float]
"""An artifact, and the seconds that building it takes; none where it exists."""


def seconds_of(jobs: Sequence[Sequence[Step]], workers: int) -> float:
    """Until the last of the jobs ends. Each goes to the worker that is free first, in their order.

    A job builds its artifacts one after another. One that another job is building is waited for here; the store takes
    other work meanwhile, where there is some, so that this is the most that it takes.
    """
    free = [0.0] * workers
    done: dict[str, float] = {}
    for job in jobs:
        now = heapq.heappop(free)
        for artifact, seconds in job:
            now = max(now, done[artifact]) if artifact in done else now + seconds
            done.setdefault(artifact, now)
        heapq.heappush(free, now)
    return max(free)
