"""Following a job's log until the job is over, across connections that are lost."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from cluster.jobs import JobFacts, JobServer
from pipeline.errors import ClusterUnreachable

SILENCE_SECONDS = 15.0
"""A log that is silent for so long is asked about: the connection may be dead, or the job over."""

LOST_SECONDS = 600.0
"""How long a cluster may be out of reach before following is given up."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds between two tries to reach it."""


def follow(server: JobServer, job: str, show: Callable[[str], None], say: Callable[[str], None]) -> JobFacts:
    """Show what a job writes, from its beginning, each piece once; return what is known of it once it is over.

    Raises ClusterUnreachable after LOST_SECONDS without an answer; the job may be going on then.
    """
    return asyncio.run(_Follower(server, job, show, say).follow())


class _Follower:
    def __init__(self, server: JobServer, job: str, show: Callable[[str], None], say: Callable[[str], None]) -> None:
        self._server, self._job, self._show, self._say = server, job, show, say
        self._num_shown = 0
        """Characters of the log."""

    async def follow(self) -> JobFacts:
        """Show the log to its end; come back whenever the connection is lost."""
        lost_at, pause = None, FIRST_PAUSE
        while True:
            num_shown = self._num_shown
            try:
                await self._show_rest()
                facts = await asyncio.to_thread(self._server.facts, self._job)
                lost_at, pause = None, FIRST_PAUSE
                if facts.is_over:
                    return facts
            except ClusterUnreachable as error:
                if self._num_shown > num_shown:  # it was reached meanwhile
                    lost_at, pause = None, FIRST_PAUSE
                if lost_at is None:
                    self._say(f"{error.message}; trying again, the job does not need this")
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > LOST_SECONDS:
                    raise
                pause = min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _show_rest(self) -> None:
        """Show what has not been shown yet, for as long as the connection lasts."""
        position = 0
        async for text in self._pieces():
            fresh = text[max(0, self._num_shown - position) :]
            position += len(text)
            if fresh:
                self._show(fresh)
                self._num_shown = position

    async def _pieces(self) -> AsyncIterator[str]:
        """Yield pieces of the log; ends with the log, or where it is silent because the job is over."""
        tail = self._server.tail(self._job)
        waited: asyncio.Future[str] | None = None
        try:
            while True:
                waited = asyncio.ensure_future(anext(tail))
                while not (await asyncio.wait({waited}, timeout=SILENCE_SECONDS))[0]:
                    if (await asyncio.to_thread(self._server.facts, self._job)).is_over:
                        return
                try:
                    yield waited.result()
                except StopAsyncIteration:
                    return
        finally:
            if waited is not None and waited.cancel():
                await asyncio.wait({waited})
            await tail.aclose()
