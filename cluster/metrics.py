"""What a worker tells Ray's metrics, and so Prometheus and Ray's dashboard: work done, bytes moved, batches on the way.

Rates are left to whoever asks: `rate(ray_secateur_tokens_total[1m])` is tokens per second, over any window and summed
over any stages. Ray puts `ray_` before each name, `_total` behind a counter's, and adds the node and the worker.
"""

from ray.util.metrics import Counter, Gauge

TAGS = ("stage", "replica")


class WorkerMetrics:
    """The metrics of one replica of one stage, each tagged with both; made in the actor's own process."""

    def __init__(self, stage: int, replica: int) -> None:
        self._tags = {"stage": str(stage), "replica": str(replica)}
        self._blocks = self._counter("blocks_done", "Blocks pruned and committed.")
        self._tokens = self._counter("tokens", "Tokens that have gone through a block, once for each block and pass.")
        self._bytes_read = self._counter("bytes_read", "Bytes of weights read from the source and from shards.")
        self._bytes_written = self._counter("bytes_written", "Bytes of shards written.")
        self._bytes_sent = self._counter("bytes_sent", "Bytes of hidden states handed to the next stage.")
        about = "Batches handed to the next stage and not yet taken by it."
        self._in_flight = Gauge("secateur_batches_in_flight", about, TAGS).set_default_tags(self._tags)
        self.batches_in_flight(0)

    def block_done(self) -> None:
        """One block more is committed."""
        self._blocks.inc()

    def tokens(self, num_tokens: int) -> None:
        """So many tokens (at least 1) have gone through a block."""
        self._tokens.inc(num_tokens)

    def bytes_read(self, num_bytes: int) -> None:
        """So many bytes (at least 1) of weights have been read."""
        self._bytes_read.inc(num_bytes)

    def bytes_written(self, num_bytes: int) -> None:
        """So many bytes (at least 1) of shards have been written."""
        self._bytes_written.inc(num_bytes)

    def bytes_sent(self, num_bytes: int) -> None:
        """So many bytes (at least 1) of hidden states have been handed on."""
        self._bytes_sent.inc(num_bytes)

    def batches_in_flight(self, num_batches: int) -> None:
        """So many batches are on their way now."""
        self._in_flight.set(num_batches)

    def _counter(self, name: str, about: str) -> Counter:
        counter = Counter(f"secateur_{name}", about, TAGS)
        counter.set_default_tags(self._tags)
        return counter
