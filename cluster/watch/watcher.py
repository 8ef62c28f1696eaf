"""The watcher: asks the sources when it is time, and works on what is due, as much at once as the limits allow."""

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from cluster.watch.config import WatchConfig
from cluster.watch.discovery import discover
from cluster.watch.notices import deliver
from cluster.watch.pruning import Pruner
from cluster.watch.publish import open_publisher
from cluster.watch.schedule import ClockWatch, Ticker
from cluster.watch.state import Clock, State
from cluster.watch.steps import Worker
from pipeline.config import PruneConfig
from pipeline.errors import ConfigError, RunStopped, StorageError
from pipeline.progress import Say, StopAsked

LOOK_SECONDS = 1.0
"""Between two looks for releases that have become due."""


@contextmanager
def _workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads, which are waited for in the end; unless the process is told to end at once."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except Exception:
        pool.shutdown()
        raise
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot make {directory}: {error.strerror}; make it writable, or name another as `work` or for `state`"
        ) from None


class Watcher:
    """Carries out one watch configuration; several may share a state file.

    Raises StorageError where its directories cannot be made, StateError where the state file cannot be used.
    """

    def __init__(
        self, config: WatchConfig, pruner: Pruner, api: HfApi, say: Say, stop_asked: StopAsked, clock: Clock = time.time
    ) -> None:
        for directory in (config.work, config.state.parent):
            _make(directory)
        self._config, self._api, self._say, self._stop_asked = config, api, say, stop_asked
        self.state = State(config.state, clock)
        prune = PruneConfig.model_validate(config.job.get("prune", {}))
        publisher = open_publisher(config.publish, prune.target, api)
        self._worker = Worker(config, self.state, api, pruner, publisher, say, stop_asked)

    def once(self) -> None:
        """Ask the sources, then work until nothing is due: what waits for another try is left to the next time.

        Raises RunStopped where a stop is asked for meanwhile.
        """
        self._worker.sweep()
        discover(self._config, self.state, self._api, self._say, self._stop_asked)
        with _workers(self._config.limits.jobs) as pool:
            running: set[Future[None]] = set()
            while self._fill(pool, running):
                running = self._reap(running)
        self._deliver()
        self._stop_if_asked()

    def keep_on(self) -> None:
        """Ask the sources whenever the schedule says so, and work on what is due, until asked to stop (RunStopped)."""
        if self._config.schedule is None:
            raise ConfigError("there is no `schedule`: add one, or use --once with a scheduler of your own")
        ticker, clock = Ticker(self._config.schedule), ClockWatch(self.state.clock)
        self._worker.sweep()
        ticker.start()
        try:
            with _workers(self._config.limits.jobs) as pool:
                running: set[Future[None]] = set()
                while not self._stop_asked():
                    self._realign(ticker, clock)
                    if ticker.due.is_set():
                        ticker.due.clear()
                        discover(self._config, self.state, self._api, self._say, self._stop_asked)
                        self._say(f"next look at the sources: {ticker.next_time():%Y-%m-%d %H:%M:%S}")
                    self._fill(pool, running)
                    self._deliver()
                    running = self._reap(running) if running else self._rest(ticker)
        finally:
            ticker.stop()
        self._stop_if_asked()

    def _fill(self, pool: ThreadPoolExecutor, running: set[Future[None]]) -> bool:
        """Begin what is due and allowed; whether anything is under way."""
        while len(running) < self._config.limits.jobs and not self._stop_asked():
            claim = self.state.claim(self._config.ceilings, self._config.retry_policy)
            if claim is None:
                break
            running.add(pool.submit(self._worker.work, claim))
        return bool(running)

    def _reap(self, running: set[Future[None]]) -> set[Future[None]]:
        """Wait a moment for work to end; return what still goes on."""
        done, left = wait(running, LOOK_SECONDS, FIRST_COMPLETED)
        for future in done:
            future.result()
        return left

    def _rest(self, ticker: Ticker) -> set[Future[None]]:
        ticker.due.wait(LOOK_SECONDS)
        return set()

    def _realign(self, ticker: Ticker, clock: ClockWatch) -> None:
        moved = clock.jump()
        if moved:
            self._say(f"the clock was moved by {moved:+.0f} s; the schedule is worked out anew")
            ticker.realign()

    def _deliver(self) -> None:
        deliver(self._config.webhook, self.state, self._say)

    def _stop_if_asked(self) -> None:
        if self._stop_asked():
            raise RunStopped("stopped as asked; the same command goes on where this one left off")
