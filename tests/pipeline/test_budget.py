"""The account of large buffers: what is held and was held at most, and what a ceiling refuses."""

import threading
from contextlib import suppress

import pytest

from pipeline.budget import Budget, Lease
from pipeline.errors import BudgetExceeded


def test_what_is_taken_is_held_until_it_is_given_back() -> None:
    budget = Budget()
    weights = budget.take("device", 100, "weights")
    budget.take("device", 20, "masks")
    weights.give_back()
    assert (budget.held("device"), budget.peak("device")) == (20, 120)
    assert (budget.held("host"), budget.held("spool")) == (0, 0)


def test_a_lease_is_given_back_only_once() -> None:
    budget = Budget()
    budget.take("host", 1, "the rest")
    with budget.take("host", 10, "a batch") as lease:
        assert budget.held("host") == 11
        lease.give_back()
    lease.give_back()
    assert budget.held("host") == 1


def test_a_ceiling_may_be_reached_and_not_passed() -> None:
    budget = Budget({"spool": 100})
    budget.take("spool", 60, "boundary 0")
    budget.take("spool", 40, "boundary 1")
    with pytest.raises(BudgetExceeded, match=r"boundary 2 needs 1 bytes \(1 B\), and 100 of the 100 that may be held"):
        budget.take("spool", 1, "boundary 2")
    assert (budget.held("spool"), budget.peak("spool")) == (100, 100)


def test_a_refusal_names_the_largest_that_are_held_and_the_way_out() -> None:
    budget = Budget({"host": 10_000}, baseline=500)
    budget.take("host", 1, "a crumb")
    for size, what in ((2000, "masks"), (4000, "weights"), (3000, "ranks")):
        budget.take("host", size, what)
    with pytest.raises(BudgetExceeded, match="targets needs 2,000 bytes") as refused:
        budget.take("host", 2000, "targets")
    told = "9,501 of the 10,000 that may be held (host) are taken (most by weights 4 kB, ranks 3 kB, masks 2 kB); "
    assert told in refused.value.message
    assert "memory.host" in refused.value.message


def test_the_baseline_counts_as_held_in_host_memory_alone() -> None:
    budget = Budget({"host": 100, "device": 100}, baseline=70)
    assert (budget.held("host"), budget.peak("host"), budget.free("host")) == (70, 70, 30)
    assert (budget.held("device"), budget.free("device"), budget.free("spool")) == (0, 100, None)


def test_nothing_is_free_where_the_baseline_is_above_the_ceiling() -> None:
    budget = Budget({"host": 10}, baseline=11)
    assert budget.free("host") == 0
    with pytest.raises(BudgetExceeded, match="1 bytes"):
        budget.take("host", 1, "a crumb")


@pytest.mark.parametrize("ceilings", [{"host": 100}, {"device": 100}, {"host": 100, "device": 5000}])
def test_on_a_cpu_device_and_host_are_one_account_under_the_lower_ceiling(ceilings: dict[str, int]) -> None:
    budget = Budget(ceilings, baseline=10, unified=True)  # type: ignore[arg-type]
    budget.take("device", 60, "weights")
    budget.take("host", 20, "hidden states")
    assert (budget.held("host"), budget.held("device")) == (90, 90)
    assert (budget.free("host"), budget.free("device")) == (10, 10)
    with pytest.raises(BudgetExceeded, match=r"\(host\)"):
        budget.take("device", 11, "a batch")


def test_a_ceiling_that_is_none_is_no_ceiling() -> None:
    budget = Budget({"host": None}, unified=True)
    budget.take("host", 1 << 50, "a petabyte")
    assert budget.free("host") is None


def test_threads_never_hold_more_than_the_ceiling_between_them() -> None:
    budget = Budget({"host": 50})
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(500):
            leases: list[Lease] = []
            with suppress(BudgetExceeded):
                for _ in range(3):
                    leases.append(budget.take("host", 7, "a batch"))
            for lease in leases:
                lease.give_back()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < budget.peak("host") <= 50
    assert budget.held("host") == 0
