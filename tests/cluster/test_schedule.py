"""Tasks that wait for each other, and for what only one can have."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.schedule import Task, schedule


def test_a_task_begins_when_all_it_waits_for_has_ended() -> None:
    tasks = [Task(seconds=2), Task(seconds=3), Task(seconds=1, after=(0, 1)), Task(seconds=1, after=(0,))]
    assert schedule(tasks) == [(0, 2), (0, 3), (3, 4), (2, 3)]


def test_a_resource_goes_to_whoever_comes_first_wherever_it_stands_in_the_list() -> None:
    tasks = [
        Task(seconds=2),
        Task(seconds=5, after=(0,), resource="disk"),
        Task(seconds=1),
        Task(seconds=3, after=(2,), resource="disk"),
        Task(seconds=1, after=(2,), resource="another disk"),
    ]
    assert schedule(tasks) == [(0, 2), (4, 9), (0, 1), (1, 4), (1, 2)]


def test_who_comes_at_the_same_time_gets_a_resource_in_the_order_of_the_list() -> None:
    assert schedule([Task(seconds=2, resource="disk")] * 3) == [(0, 2), (2, 4), (4, 6)]


def test_tasks_may_be_listed_before_what_they_wait_for() -> None:
    assert schedule([Task(seconds=1, after=(1,)), Task(seconds=2)]) == [(2, 3), (0, 2)]


def test_a_circle_is_noticed() -> None:
    with pytest.raises(AssertionError, match="circle"):
        schedule([Task(seconds=1, after=(1,)), Task(seconds=1, after=(0,))])


@st.composite
def task_lists(draw: st.DrawFn) -> list[Task]:
    return [
        Task(
            seconds=draw(st.floats(0, 10)),
            after=tuple(draw(st.sets(st.integers(0, place - 1), max_size=3))) if place else (),
            resource=draw(st.sampled_from([None, "a", "b"])),
        )
        for place in range(draw(st.integers(1, 12)))
    ]


@given(task_lists())
def test_a_schedule_keeps_order_shares_nothing_and_wastes_nothing(tasks: list[Task]) -> None:
    times = schedule(tasks)
    for place, (task, (start, end)) in enumerate(zip(tasks, times, strict=True)):
        assert end == start + task.seconds
        came = max((times[needed][1] for needed in task.after), default=0.0)
        others = [times[i] for i, other in enumerate(tasks) if i != place and other.resource == task.resource]
        if task.resource is None:
            assert start == came
        else:
            assert all(end <= begun or start >= ended for begun, ended in others)
            assert start == came or (start > came and start in {ended for _, ended in others})
