"""When sources are asked: APScheduler's triggers, and a watch on the machine's clock; the one file that knows it."""

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Event

from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from cluster.watch.config import ScheduleConfig
from pipeline.errors import ConfigError

JUMP_SECONDS = 30.0
"""How far the wall clock may move against the steady one before it is called a jump."""

_DAYS = re.compile(r"([0-7])(?:-([0-7])(?:/([1-7]))?)?")
_NAMES = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")


def make_trigger(schedule: ScheduleConfig) -> BaseTrigger:
    """Return what says when; raises ConfigError for a cron line or a time zone that makes no sense."""
    if schedule.every is not None:
        return IntervalTrigger(seconds=schedule.every)
    try:
        trigger = CronTrigger.from_crontab(_with_named_days(schedule.cron or ""), timezone=schedule.timezone)
        if trigger.get_next_fire_time(None, datetime.now(UTC)) is None:
            raise ValueError("such a day never comes")
        return trigger
    except (ValueError, LookupError, OSError) as error:
        raise ConfigError(
            f"schedule: {schedule.cron!r} in time zone {schedule.timezone or 'of this machine'} is no schedule: {error}"
            ". A cron line has five fields, such as 0 * * * * for every full hour"
        ) from None


def _with_named_days(cron: str) -> str:
    """Return a cron line whose days of the week are names: cron counts them from Sunday, APScheduler from Monday."""
    fields = cron.split()
    return " ".join([*fields[:4], *(",".join(map(_named_days, field.split(","))) for field in fields[4:])])


def _named_days(part: str) -> str:
    match = _DAYS.fullmatch(part)
    if match is None:
        return part
    first, last = int(match[1]), int(match[2] or match[1])
    days = [_NAMES[day % 7] for day in range(first, last + 1, int(match[3] or 1))]
    return ",".join(days) or part  # APScheduler refuses what counts down, in words of its own


class Ticker:
    """Sets an event whenever the schedule says so, and once at the beginning; missed times count as one."""

    def __init__(self, schedule: ScheduleConfig) -> None:
        self.due = Event()
        self._trigger = make_trigger(schedule)
        self._scheduler = BackgroundScheduler()

    def start(self) -> None:
        """Begin; due at once."""
        self._scheduler.add_job(
            self.due.set, self._trigger, id="poll", coalesce=True, max_instances=1, misfire_grace_time=None
        )
        self._scheduler.start()
        self.due.set()

    def realign(self) -> None:
        """Work out the next time anew, from the clock as it is now; due at once."""
        self._scheduler.reschedule_job("poll", trigger=self._trigger)
        self.due.set()

    def next_time(self) -> datetime | None:
        """Return when it is due next."""
        next_time: datetime | None = self._scheduler.get_job("poll").next_run_time
        return next_time

    def stop(self) -> None:
        """End its thread."""
        self._scheduler.shutdown(wait=False)


class ClockWatch:
    """Notices that somebody has set the machine's clock, or that it slept."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._offset = wall() - steady()

    def jump(self) -> float:
        """Return the seconds by which the clock was moved since the last question; 0 where it was not."""
        offset = self._wall() - self._steady()
        moved = offset - self._offset
        if abs(moved) < JUMP_SECONDS:
            return 0.0
        self._offset = offset
        return moved
