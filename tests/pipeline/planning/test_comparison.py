"""What a run took beside what was planned."""

import pytest

from pipeline.config import parse_config
from pipeline.planning.comparison import Measured, compare
from pipeline.planning.plan import Plan, make_plan
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    directory = tmp_path_factory.mktemp("comparison")
    save_tiny("llama", directory / "model")
    raw = {"model": str(directory / "model"), "output": str(directory / "run"), "compute": {"device": "cpu"}}
    return make_plan(parse_config(raw, "the test"), directory / "model", None, baseline=10**9)


def test_planned_and_measured_stand_side_by_side_with_their_ratio(plan: Plan) -> None:
    found = compare(plan, Measured(host_bytes=2 * plan.host_bytes, bytes_written=plan.bytes_written))
    assert found == {
        "host_bytes": {"planned": plan.host_bytes, "measured": 2 * plan.host_bytes, "ratio": 2.0},
        "bytes_written": {"planned": plan.bytes_written, "measured": plan.bytes_written, "ratio": 1.0},
    }


def test_what_is_not_planned_or_not_measured_is_left_out(plan: Plan) -> None:
    assert compare(plan, Measured(device_bytes=5, spool_bytes=5, seconds=5.0)) == {}
    assert compare(plan, Measured()) == {}
