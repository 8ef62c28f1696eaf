"""Which way of using memory a run takes, and why none will do: ceilings held against the footprint.

Of the choices that stay under every ceiling the first is taken, in the order of `preferences`. Where none does, the
refusal says by how much, and names only ways out that were tried and found to be enough.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from pipeline.budget import Place
from pipeline.human import human_bytes
from pipeline.memory_config import Tier
from pipeline.planning.footprint import Choice, footprint
from pipeline.planning.held import Phase
from pipeline.planning.scale import Scale
from pipeline.recipe import parse_recipe
from pipeline.sparsity import Sparsity

DEEP = 8
"""Batches on their way where there is room: the disk goes on with hidden states while a block is pruned."""

FRUGAL = ("wanda", "magnitude")
"""Recipes that need the least memory, offered where the asked one does not fit."""


ANOTHER_SOURCE = "calibration.source: {tokens: FILE}, written where the model fits, or {text: FILE}"
"""Way out where the whole model does not fit, which is to write its calibration text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most that may be held in one place."""

    num_bytes: int
    setting: str | None = None
    """The setting that says so; None where it is what this machine has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What a run may use."""

    limits: dict[Place, Limit]
    baseline: int
    """Host bytes held by the interpreter and its libraries, which count towards the host's limit."""

    free_host: int
    """Host bytes that are free now: page-locked memory may take half of them."""

    managed: bool
    """Whether there are ceilings, so that weights are read past the page cache."""


def choose(scale: Scale, room: Room, asked: Tier | Literal["auto"]) -> Choice | None:
    """Return the first choice that stays under every limit, or None; with deep queues to the spool where those fit."""
    found = next((choice for choice in preferences(scale, room, asked) if not exceeded(scale, choice, room)), None)
    if found is None or found.tier != "disk":
        return found
    deeper = replace(found, depth=DEEP)
    return found if exceeded(scale, deeper, room) else deeper


def preferences(scale: Scale, room: Room, asked: Tier | Literal["auto"]) -> Iterator[Choice]:
    """Yield the choices worth trying, the fastest first; the last takes the least memory.

    Fusing saves reading hidden states once, where that costs anything; reading ahead hides the reading of weights: a
    second block ahead, that of the time when two are fused.
    Where both do not fit, the one that spares more bytes comes first.
    """
    for tier in _tiers(scale, room) if asked == "auto" else [asked]:
        saved = scale.num_boundaries * scale.work.boundary_bytes
        may_fuse = tier == "disk" or (tier != "device" and not scale.unified)
        may_read_ahead = room.managed or not scale.unified or tier == "disk"
        hidden = scale.block_numel * scale.stored.itemsize
        one, most = int(may_read_ahead), int(may_read_ahead) * (2 if may_fuse else 1)
        options = [(may_fuse, most), (may_fuse, one), (may_fuse, 0), (False, one), (False, 0)]
        options.sort(key=lambda o: saved * o[0] + hidden * o[1], reverse=True)
        for fused, ahead in dict.fromkeys(options):
            yield Choice(tier=tier, fused=fused, ahead=ahead)


def exceeded(scale: Scale, choice: Choice, room: Room) -> dict[Place, Phase]:
    """Return the places whose limit a choice would pass, each with the phase that needs most there."""
    phases = footprint(scale, choice, room.baseline)
    needed = {place: max(phases, key=lambda phase, p=place: phase.bytes_in(p)) for place in room.limits}  # type: ignore[misc]
    return {place: phase for place, phase in needed.items() if phase.bytes_in(place) > room.limits[place].num_bytes}


def beyond(phase: Phase, room: Room, ways_out: Sequence[str]) -> tuple[str, ...]:
    """Return why a phase does not fit, a line for each limit that it passes; empty where it does fit."""
    return tuple(
        _told(place, phase, limit, [*_higher(place, phase, limit), *ways_out])
        for place, limit in room.limits.items()
        if phase.bytes_in(place) > limit.num_bytes
    )


def refusal(scale: Scale, room: Room, asked: Tier | Literal["auto"], sparsity: Sparsity) -> tuple[str, ...]:
    """Return why no choice fits, a line for each limit that the most frugal one passes; empty where one does."""
    if choose(scale, room, asked) is not None:
        return ()
    least = min(preferences(scale, room, asked), key=lambda choice: _excess(scale, choice, room))
    ways_out = _ways_out(scale, room, asked, sparsity)
    return tuple(
        _told(place, phase, room.limits[place], [*_higher(place, phase, room.limits[place]), *ways_out])
        for place, phase in exceeded(scale, least, room).items()
    )


def _tiers(scale: Scale, room: Room) -> list[Tier]:
    """Tiers in the order of their speed, but for the device's memory, which is asked for or not used."""
    pinned = not scale.unified and scale.num_boundaries * scale.work.boundary_bytes <= room.free_host // 2
    return [*(("pinned",) if pinned else ()), "host", "disk"]


def _excess(scale: Scale, choice: Choice, room: Room) -> int:
    return sum(phase.bytes_in(p) - room.limits[p].num_bytes for p, phase in exceeded(scale, choice, room).items())


def _told(place: Place, phase: Phase, limit: Limit, ways_out: Sequence[str]) -> str:
    """State the fact, the numbers, the rule and the way out."""
    needed = phase.bytes_in(place)
    largest = sorted((h for h in phase.held if h.place == place), key=lambda h: h.num_bytes, reverse=True)[:3]
    held = ", ".join(f"{h.what} {human_bytes(h.num_bytes)}" for h in largest)
    source = limit.setting or f"all that this machine has free ({place})"
    ways = "; or ".join(ways_out) or "no single setting would make it fit: lower several of them, or prune elsewhere"
    return (
        f"{phase.name} needs {human_bytes(needed)} ({place}), {human_bytes(needed - limit.num_bytes)} above "
        f"{source}: {human_bytes(limit.num_bytes)}. It holds {held}. What would do: {ways}"
    )


def _higher(place: Place, phase: Phase, limit: Limit) -> list[str]:
    """A ceiling of the user's may be raised to what is needed, in whole MiB; a machine's cannot."""
    mebibytes = -(-phase.bytes_in(place) // 2**20)
    return [] if limit.setting is None else [f"{limit.setting}: {mebibytes}MiB"]


def _ways_out(scale: Scale, room: Room, asked: Tier | Literal["auto"], sparsity: Sparsity) -> list[str]:
    """Return the changes of one setting after which the run fits."""

    def fits(other: Scale, tier: Tier | Literal["auto"] = asked) -> bool:
        return choose(other, room, tier) is not None

    def with_batch(batch: int) -> Scale:
        return replace(scale, work=replace(scale.work, batch=batch))

    def with_sequences(count: int) -> Scale:
        return replace(scale, work=replace(scale.work, num_sequences=count))

    found = []
    if batch := _largest(scale.work.batch - 1, lambda n: fits(with_batch(n))):
        found.append(f"compute.batch: {batch}")
    if count := _largest(scale.work.num_sequences - 1, lambda n: fits(with_sequences(n))):
        found.append(f"calibration.sequences: {count}")
    if asked != "auto":
        others = (tier for tier in reversed(get_args(Tier)) if tier != asked and fits(scale, tier))
        found += [f"memory.activations: {tier}" for tier in list(others)[:1]]
    recipes = {name: parse_recipe([name], sparsity) for name in FRUGAL}
    smaller = [name for name, recipe in recipes.items() if fits(replace(scale, recipe=recipe))]
    if smaller and all(recipe != scale.recipe for recipe in recipes.values()):
        found.append(f"prune.recipe: [{smaller[0]}]")
    if scale.generation is not None and fits(replace(scale, generation=None)):
        found.append(ANOTHER_SOURCE)
    return found


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to `most` that fits, or 0; what fits, fits with every smaller number too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
