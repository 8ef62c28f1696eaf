"""The `cluster` section of a configuration: how a run is spread over many workers."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Handoff = Literal["pruned", "dense"]


class ClusterConfig(BaseModel):
    """Stages, replicas, and what passes between them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    address: str = Field(default="auto", min_length=1)
    """`auto` joins the cluster this machine belongs to, or starts one here; `local` starts one here; else the
    HOST:PORT of a Ray head to join."""

    stages: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Into how many ranges the blocks are split, each with workers of its own."""

    replicas: Literal["auto"] | Annotated[int, Field(ge=1)] = 1
    """Workers of each stage; they split the calibration sequences. Changes BESA's mini-batches and the rounding of
    Gram matrices, so it is part of the run's identity; `auto` is 1, and says what more would give."""

    handoff: Handoff = "pruned"
    """`pruned`: the next stage starts from what the pruned blocks make, as one process would; `dense`: from what
    the dense blocks make, so that all stages prune at once."""

    window: int = Field(default=4, ge=2)
    """Batches from one worker to the next that may lie in the object store: one is leaving, the others on their way."""

    transport: Literal["auto", "objects", "direct"] = "auto"
    """How batches travel: through Ray's object store, or from device to device where Ray can (`auto` tries)."""

    shards: Literal["auto", "shared", "sent"] = "auto"
    """Whether workers write their shards into the run directory themselves (`shared`), or send them to the machine
    that has it; `auto` looks whether every worker can see the run directory."""

    scratch: Path | None = None
    """Where workers keep a shard until it is sent; the system's temporary directory when absent."""

    cpus: int = Field(default=1, ge=1)
    """CPUs of each worker; without an accelerator also the threads it computes with."""

    gpus: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Accelerators of each worker; `auto` is 1 where the cluster has any and `compute.device` is not cpu."""

    patience: float = Field(default=60, gt=0)
    """Seconds to wait for a worker's resources before the job goes on with fewer workers."""

    give_up_after: float = Field(default=600, gt=0)
    """Seconds without resources for any worker after which the job ends; it can be started again."""

    max_restarts: int = Field(default=3, ge=0)
    """Restarts of a stage without any progress between them after which the job ends."""
