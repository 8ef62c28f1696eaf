"""When tasks begin and end that need each other, and things that only one of them can have at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something that takes time."""

    seconds: float
    after: tuple[int, ...] = ()
    """The tasks it waits for, by their places in the list of tasks."""

    resource: str | None = None
    """What it has to itself meanwhile."""


def schedule(tasks: Sequence[Task]) -> list[tuple[float, float]]:
    """Return start and end of each task: as early as can be, first come first served (ties by place in the list)."""
    followers: list[list[int]] = [[] for _ in tasks]
    for place, task in enumerate(tasks):
        for needed in task.after:
            followers[needed].append(place)
    missing, ready = [len(task.after) for task in tasks], [0.0] * len(tasks)
    # Tasks come off this queue in the order in which they could begin, so that each resource is given in that order.
    queue = [(0.0, place) for place, count in enumerate(missing) if count == 0]
    heapify(queue)
    times, free = [(0.0, 0.0)] * len(tasks), dict[str, float]()
    while queue:
        start, place = heappop(queue)
        resource = tasks[place].resource
        if resource is not None:
            start = max(start, free.get(resource, 0.0))
            free[resource] = start + tasks[place].seconds
        times[place] = (start, start + tasks[place].seconds)
        for follower in followers[place]:
            ready[follower] = max(ready[follower], times[place][1])
            missing[follower] -= 1
            if missing[follower] == 0:
                heappush(queue, (ready[follower], follower))
    assert not any(missing), "tasks wait for each other in a circle"
    return times
