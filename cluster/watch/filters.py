"""Which releases are wanted: pure questions about what a source shows of them."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from cluster.watch.config import FilterConfig
from cluster.watch.lifecycle import Found
from pipeline.human import human_bytes, human_seconds


def refused_name(name: str, filters: FilterConfig) -> str:
    """Say why a name is not wanted; empty where it is. Asked before anything else is fetched of a model."""
    if filters.include and not any(re.search(pattern, name) for pattern in filters.include):
        return f"its name matches none of filters.include ({', '.join(filters.include)})"
    for pattern in filters.exclude:
        if re.search(pattern, name):
            return f"its name matches {pattern} of filters.exclude"
    return ""


def refusal(found: Found, filters: FilterConfig, disk_limit: int | None, now: float) -> str:
    """Say why a release is not wanted, all reasons at once; empty where it is."""
    reasons = [refused_name(found.name, filters), *_refusals(found, filters, now)]
    if disk_limit is not None and found.disk_bytes > disk_limit:
        reasons.append(f"it takes {human_bytes(found.disk_bytes)} of disk and limits.disk is {human_bytes(disk_limit)}")
    return "; ".join(reason for reason in reasons if reason)


def _refusals(found: Found, filters: FilterConfig, now: float) -> Iterator[str]:
    facts = found.facts
    if not found.num_bytes:
        yield "it has no safetensors weights"
    if filters.architectures and not set(_listed(facts.get("architectures"))) & set(filters.architectures):
        yield f"its architecture is {_shown(facts.get('architectures'))}, not of filters.architectures"
    if filters.licences and facts.get("licence") not in filters.licences:
        yield f"its licence is {_shown(facts.get('licence'))}, not of filters.licences"
    if filters.min_size is not None and found.num_bytes < filters.min_size:
        yield f"its weights are {human_bytes(found.num_bytes)}, less than filters.min_size"
    if filters.max_size is not None and found.num_bytes > filters.max_size:
        yield f"its weights are {human_bytes(found.num_bytes)}, more than filters.max_size"
    changed = facts.get("changed")
    if filters.max_age is not None and changed is not None and now - changed > filters.max_age:
        day = f"{datetime.fromtimestamp(changed, UTC):%Y-%m-%d}"  # and not its age, which is another at every look
        yield f"it was last changed on {day}, and filters.max_age is {human_seconds(filters.max_age)}"


def _listed(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else []


def _shown(value: Any) -> str:
    return ", ".join(_listed(value)) or str(value or "not stated")
