"""How full Ray's object stores are, and have been: asked of each node's raylet, which keeps them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

SECONDS_BETWEEN_LOOKS = 0.005
"""Asking costs a raylet 1 ms; a batch that is freed is gone 2 ms later."""


class Stores:
    """The object stores of all nodes that are alive when this is made."""

    def __init__(self) -> None:
        self._channels = {
            node["NodeID"]: init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}")
            for node in ray.nodes()
            if node["Alive"]
        }
        self.peak_bytes = dict.fromkeys(self._channels, 0)
        """The most that each node's store has held at any look, by the node's id."""

    def used_bytes(self) -> int:
        """What all stores hold now."""
        return sum(stats.object_store_bytes_used for stats in self._look().values())

    def created_bytes(self) -> int:
        """What has ever been put into any store."""
        return sum(stats.cumulative_created_bytes for stats in self._look().values())

    def watch(self, enough: threading.Event) -> None:
        """Look again and again, until it is enough."""
        while not enough.wait(SECONDS_BETWEEN_LOOKS):
            self._look()

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def _look(self) -> "dict[str, node_manager_pb2.ObjectStoreStats]":
        request = node_manager_pb2.GetNodeStatsRequest(include_memory_info=False)
        seen = {}
        for node, channel in self._channels.items():
            try:
                reply = node_manager_pb2_grpc.NodeManagerServiceStub(channel).GetNodeStats(request, timeout=10)
            except grpc.RpcError:  # a node that a test has ended
                continue
            seen[node] = reply.store_stats
            self.peak_bytes[node] = max(self.peak_bytes[node], reply.store_stats.object_store_bytes_used)
        return seen


@contextmanager
def watched_stores() -> Iterator[Stores]:
    """Watch the stores from here on: afterwards `peak_bytes` says the most that each has held."""
    stores, enough = Stores(), threading.Event()
    watcher = threading.Thread(target=stores.watch, args=(enough,))
    watcher.start()
    try:
        yield stores
    finally:
        enough.set()
        watcher.join()
        stores.close()
