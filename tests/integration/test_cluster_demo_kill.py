"""The demo model, a real one, while workers are killed: the bytes of an undisturbed run. Skipped where it is absent."""

import random
import time
from pathlib import Path

import pytest

from pipeline.config import parse_config
from tests.bench.handoffs import run_in_stages
from tests.integration.clusters import spread
from tests.integration.clusters import warm_ray as warm_ray
from tests.integration.disturbances import under_way
from tests.integration.support import carry_out, outcome
from tests.integration.test_cluster_demo import job
from tests.integration.test_demo import MODEL

pytestmark = [
    pytest.mark.demo,
    pytest.mark.long,
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="no demo model here: make demo-model"),
    pytest.mark.usefixtures("warm_ray"),
]

NUM_BLOCKS = 30
PHASES = 5 * NUM_BLOCKS


@pytest.mark.parametrize("handoff", ["pruned", "dense"])
def test_a_worker_killed_leaves_the_bytes_of_an_undisturbed_run(handoff: str, tmp_path: Path) -> None:
    settings = job(tmp_path / "undisturbed", "wanda")
    if handoff == "pruned":
        carry_out(settings)
    else:
        run_in_stages(parse_config(settings, "the test"), 3)
    instants, killed, num_runs = random.Random(handoff), False, 0
    while not killed:
        with under_way(spread(settings, tmp_path / str(num_runs), stages=3, handoff=handoff), NUM_BLOCKS) as disturbed:
            if disturbed.comes_to(instants.randrange(PHASES)):
                time.sleep(instants.uniform(0, 0.2))
                killed = disturbed.kill_one(instants)
        assert outcome(disturbed.run_directory) == outcome(tmp_path / "undisturbed")
        disturbed.check()
        num_runs += 1
