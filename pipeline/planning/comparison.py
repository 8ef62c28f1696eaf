"""What a run took, held against what its plan said it would."""

from dataclasses import asdict, dataclass

from pipeline.planning.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one session took; None where nobody measured it. The names are those of a plan's figures."""

    host_bytes: int | None = None
    """High-water mark of resident memory."""

    device_bytes: int | None = None
    spool_bytes: int | None = None
    bytes_read: int | None = None
    """From disk."""

    bytes_written: int | None = None
    seconds: float | None = None


def compare(plan: Plan, measured: Measured) -> dict[str, dict[str, float]]:
    """Return planned and measured figures by name, with `ratio`, measured by planned.

    What was not measured, or is not planned (seconds without speeds, a device on a CPU), is left out.
    """
    planned: dict[str, float | None] = {
        "host_bytes": plan.host_bytes,
        "device_bytes": plan.device_bytes,
        "spool_bytes": plan.spool_bytes,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "seconds": plan.seconds,
    }
    figures = ((name, planned[name], figure) for name, figure in asdict(measured).items())
    return {
        name: {"planned": expected, "measured": figure, "ratio": figure / expected}
        for name, expected, figure in figures
        if expected and figure is not None
    }
