"""The schedule: cron lines, intervals, missed times, and a clock that somebody sets."""

from datetime import UTC, datetime, timedelta

import pytest

from cluster.watch.config import ScheduleConfig
from cluster.watch.schedule import ClockWatch, Ticker, make_trigger
from pipeline.errors import ConfigError
from tests.cluster.watch.releases import Clock


def test_a_cron_line_says_when() -> None:
    trigger = make_trigger(ScheduleConfig(cron="30 4 * * *", timezone="UTC"))
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert trigger.get_next_fire_time(None, noon) == datetime(2026, 1, 2, 4, 30, tzinfo=UTC)


def test_an_interval_says_when() -> None:
    trigger = make_trigger(ScheduleConfig(every=3600.0))
    now = datetime.now(UTC)
    first = trigger.get_next_fire_time(None, now)
    assert trigger.get_next_fire_time(first, first) - first == timedelta(hours=1)


@pytest.mark.parametrize(
    ("field", "days"),
    [("0", "Sun"), ("7", "Sun"), ("1-5", "Mon Tue Wed Thu Fri"), ("0-6/3", "Sun Wed Sat"), ("5-7", "Fri Sat Sun"),
     ("6,1", "Mon Sat"), ("sun,2", "Sun Tue"), ("*", "Mon Tue Wed Thu Fri Sat Sun")],
)  # fmt: skip
def test_days_of_the_week_are_those_of_cron(field: str, days: str) -> None:
    trigger = make_trigger(ScheduleConfig(cron=f"0 12 * * {field}", timezone="UTC"))
    begin = datetime(2026, 1, 5, tzinfo=UTC)  # a Monday
    fires = {trigger.get_next_fire_time(None, begin + timedelta(days=day)).strftime("%a") for day in range(7)}
    assert fires == set(days.split())


@pytest.mark.parametrize(
    "schedule",
    [ScheduleConfig(cron="every now and then"), ScheduleConfig(cron="0 * * * *", timezone="Mars/Olympus"),
     ScheduleConfig(cron="0 0 31 2 *"), ScheduleConfig(cron="0 0 * * 5-1")],
)  # fmt: skip
def test_a_schedule_that_makes_no_sense_is_refused(schedule: ScheduleConfig) -> None:
    with pytest.raises(ConfigError, match=r"is no schedule: .*A cron line has five fields"):
        make_trigger(schedule)


def test_a_ticker_is_due_at_once_and_then_when_its_schedule_says() -> None:
    ticker = Ticker(ScheduleConfig(every=0.05))
    assert not ticker.due.is_set()
    ticker.start()
    try:
        assert ticker.due.is_set()
        ticker.due.clear()
        assert ticker.due.wait(30)
    finally:
        ticker.stop()


def test_a_ticker_that_is_realigned_is_due_and_works_its_next_time_out_anew() -> None:
    ticker = Ticker(ScheduleConfig(every=3600.0))
    ticker.start()
    try:
        ticker.due.clear()
        before = ticker.next_time()
        ticker.realign()
        after = ticker.next_time()
        assert ticker.due.is_set()
        assert before is not None
        assert after is not None
        assert timedelta(0) <= after - before < timedelta(minutes=5)
    finally:
        ticker.stop()


def test_a_clock_that_is_set_is_noticed_once() -> None:
    wall, steady = Clock(5000.0), Clock(100.0)
    watch = ClockWatch(wall, steady)
    for clock in (wall, steady):
        clock.now += 3600
    assert watch.jump() == 0
    wall.now -= 7200
    assert watch.jump() == -7200
    assert watch.jump() == 0
    wall.now += 20  # as a clock that is kept right by little steps
    assert watch.jump() == 0
