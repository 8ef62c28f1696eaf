"""A worker's metrics, read as Prometheus reads them: from the port that Ray opens on each node."""

import re
import time
import urllib.request

import ray

from cluster.metrics import WorkerMetrics
from tests.cluster.ray_session import ray_cluster as ray_cluster

EXPECTED = {
    "ray_secateur_blocks_done_total": 2,
    "ray_secateur_tokens_total": 4096,
    "ray_secateur_bytes_read_total": 30,
    "ray_secateur_bytes_written_total": 20,
    "ray_secateur_bytes_sent_total": 10,
    "ray_secateur_batches_in_flight": 1,
}


class Worker:
    """An actor that has done some work."""

    def __init__(self) -> None:
        self._metrics = WorkerMetrics(stage=3, replica=1)

    def work(self) -> None:
        self._metrics.block_done()
        self._metrics.tokens(2048)
        self._metrics.bytes_read(15)
        self._metrics.bytes_written(10)
        self._metrics.bytes_sent(5)
        self._metrics.batches_in_flight(2)
        self._metrics.batches_in_flight(1)


def scraped() -> dict[str, float]:
    """What the node tells of replica 1 of stage 3, by name."""
    (node,) = ray.nodes()
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as reply:
        page = reply.read().decode()
    lines = re.findall(r"^(ray_secateur_\w+)\{(.*)\} (\S+)$", page, re.MULTILINE)
    return {name: float(value) for name, tags, value in lines if 'replica="1"' in tags and 'stage="3"' in tags}


def test_prometheus_finds_what_a_worker_counted_under_its_stage_and_replica(ray_cluster: None) -> None:
    worker = ray.remote(num_cpus=0)(Worker).remote()
    ray.get([worker.work.remote(), worker.work.remote()])
    deadline = time.monotonic() + 60
    while (found := scraped()) != EXPECTED:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
