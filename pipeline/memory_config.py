"""The `memory` section of a configuration: ceilings of every kind of memory, and where hidden states are kept.

None of it changes what comes out, so none of it is part of a run's identity: a run may be stopped, and go on under
other ceilings, to the same bytes.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

Tier = Literal["device", "pinned", "host", "disk"]
"""Where hidden states are kept: where blocks run, in page-locked host memory, in host memory, or in the spool."""

Ceiling = Annotated[ByteSize, Field(gt=0)]


class MemoryConfig(BaseModel):
    """What a run may hold at most, in bytes; sizes such as `20GiB` or `500MB` may be given."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    device: Ceiling | None = None
    """Ceiling of device memory. On a CPU, blocks run in host memory: there the lower of both ceilings holds."""

    host: Ceiling | None = None
    """Ceiling of this process's resident memory, the interpreter and its libraries included."""

    spool: Path | None = None
    """Directory under which the run makes its spool; the run directory when absent."""

    spool_limit: Ceiling | None = None
    """Ceiling of the spool's size."""

    activations: Tier | Literal["auto"] = "auto"
    """Where hidden states between blocks are kept; `auto` takes the fastest place that the ceilings leave."""

    io: Literal["auto", "aio", "threads"] = "auto"
    """What moves bytes to and from the disk; `auto` is DeepSpeed's asynchronous I/O where it is built, else threads."""

    @property
    def is_managed(self) -> bool:
        """Whether a run is to keep to what is said here, and so to move bytes past the page cache."""
        return self != MemoryConfig(activations=self.activations)
