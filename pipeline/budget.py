"""One account of all large buffers: what is held on the device, in host memory and in the spool, under ceilings.

Whoever makes a buffer whose size depends on the model takes it from the budget first and gives it back afterwards.
What would pass a ceiling is refused before it is allocated, with the numbers, and never found out by the kernel.
"""

import threading
from collections.abc import Mapping
from typing import Literal

from pipeline.errors import BudgetExceeded
from pipeline.human import human_bytes

Place = Literal["device", "host", "spool"]

WAYS_OUT: dict[Place, str] = {
    "device": "raise memory.device, or lower compute.batch",
    "host": "raise memory.host, lower compute.batch, or keep hidden states on disk (`memory.activations: disk`)",
    "spool": "raise memory.spool_limit, or lower calibration.sequences",
}


class Budget:
    """What may be held in each place, in bytes; safe to use from several threads."""

    def __init__(
        self, ceilings: Mapping[Place, int | None] | None = None, *, baseline: int = 0, unified: bool = False
    ) -> None:
        """`ceilings`: most bytes of each place; a place that is absent, or None, has none.

        `baseline`: host bytes held before anything is taken, by the interpreter and its libraries. `unified`: the
        device's memory is the host's (a CPU), so both are one account under the lower of both ceilings.
        """
        self._ceilings = {place: limit for place, limit in (ceilings or {}).items() if limit is not None}
        self._unified = unified
        if unified and (device := self._ceilings.pop("device", None)) is not None:
            self._ceilings["host"] = min(device, self._ceilings.get("host", device))
        self._held: dict[Place, int] = {"device": 0, "host": baseline, "spool": 0}
        self._peak = dict(self._held)
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()

    def take(self, place: Place, num_bytes: int, what: str) -> "Lease":
        """Count `num_bytes` as held until the lease is given back.

        Raises BudgetExceeded, naming `what` and the largest of what is held, where they would pass the ceiling.
        """
        assert num_bytes >= 0, f"{what}: {num_bytes} bytes"
        place = self._account(place)
        with self._lock:
            ceiling, held = self._ceilings.get(place), self._held[place]
            if ceiling is not None and held + num_bytes > ceiling:
                raise BudgetExceeded(self._refusal(place, num_bytes, what, ceiling))
            lease = Lease(self, place, num_bytes, what)
            self._leases.add(lease)
            self._held[place] = held + num_bytes
            self._peak[place] = max(self._peak[place], held + num_bytes)
            return lease

    def held(self, place: Place) -> int:
        """Bytes held now; for the host with the baseline."""
        return self._held[self._account(place)]

    def peak(self, place: Place) -> int:
        """Most bytes held at any time so far; for the host with the baseline."""
        return self._peak[self._account(place)]

    def free(self, place: Place) -> int | None:
        """Bytes that may still be taken, or None where there is no ceiling."""
        ceiling = self._ceilings.get(self._account(place))
        return None if ceiling is None else max(0, ceiling - self.held(place))

    def _give_back(self, lease: "Lease") -> None:
        with self._lock:
            if lease in self._leases:
                self._leases.remove(lease)
                self._held[lease.place] -= lease.num_bytes

    def _account(self, place: Place) -> Place:
        return "host" if self._unified and place == "device" else place

    def _refusal(self, place: Place, num_bytes: int, what: str, ceiling: int) -> str:
        here = sorted((n for n in self._leases if n.place == place), key=lambda n: n.num_bytes, reverse=True)
        largest = ", ".join(f"{lease.what} {human_bytes(lease.num_bytes)}" for lease in here[:3])
        return (
            f"{what} needs {num_bytes:,} bytes ({human_bytes(num_bytes)}), and {self._held[place]:,} of the "
            f"{ceiling:,} that may be held ({place}) are taken{f' (most by {largest})' if largest else ''}; "
            f"{WAYS_OUT[place]}"
        )


class Lease:
    """Bytes taken from a budget; given back once, by `give_back` or at the end of a `with` block."""

    __slots__ = ("_budget", "num_bytes", "place", "what")

    def __init__(self, budget: Budget, place: Place, num_bytes: int, what: str) -> None:
        self._budget = budget
        self.place: Place = place
        self.num_bytes = num_bytes
        self.what = what

    def give_back(self) -> None:
        """Stop counting these bytes; does nothing the second time."""
        self._budget._give_back(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(self, *exception: object) -> None:
        self.give_back()
