"""Which choice is taken under which ceilings; what is refused, and whether the named ways out are really ways out."""

import re
from dataclasses import replace

import pytest

from pipeline.budget import Place
from pipeline.methods.besa import Besa
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.wanda import Wanda
from pipeline.planning.fitting import ANOTHER_SOURCE, DEEP, Limit, Room, choose, exceeded, preferences, refusal
from pipeline.planning.footprint import Choice, footprint
from pipeline.planning.scale import Generation, Scale
from pipeline.sparsity import Unstructured
from tests.scales import LLAMA_70B, scale_70b

HALF = Unstructured(ratio=0.5)
BASELINE = 500 << 20
SMALL = replace(LLAMA_70B, num_sequences=8, num_tokens=128)
WANDA_ON_CPU, BESA_ON_CPU = (scale_70b(step, unified=True, work=SMALL) for step in (Wanda(), Besa()))


def room(managed: bool = True, **ceilings: int | None) -> Room:
    """Ceilings in bytes by place; what has none has a terabyte."""
    places: tuple[Place, ...] = ("device", "host", "spool")
    limits = {
        p: Limit(num_bytes=size, setting="memory.spool_limit" if p == "spool" else f"memory.{p}")
        if (size := ceilings.get(p)) is not None
        else Limit(num_bytes=10**12)
        for p in places
    }
    return Room(limits=limits, baseline=BASELINE, free_host=10**12, managed=managed)


def test_without_ceilings_a_cpu_keeps_hidden_states_in_memory_as_simply_as_it_can() -> None:
    assert choose(WANDA_ON_CPU, room(managed=False), "auto") == Choice(tier="host", fused=False, ahead=0)


def test_without_ceilings_a_gpu_pins_fuses_and_reads_ahead() -> None:
    assert choose(scale_70b(Wanda()), room(managed=False), "auto") == Choice(tier="pinned", fused=True, ahead=2)


def test_page_locked_memory_takes_at_most_half_of_what_is_free() -> None:
    wide = room(managed=False)
    assert choose(scale_70b(Wanda()), replace(wide, free_host=2 * 2**32), "auto") == Choice(
        tier="pinned", fused=True, ahead=2
    )
    narrow = choose(scale_70b(Wanda()), replace(wide, free_host=2 * 2**32 - 2), "auto")
    assert narrow == Choice(tier="host", fused=True, ahead=2)


def test_hidden_states_go_to_disk_where_memory_does_not_hold_them() -> None:
    long = scale_70b(Wanda(), unified=True)
    choice = choose(long, room(host=6 << 30), "auto")
    assert choice is not None
    assert choice.tier == "disk"
    assert choose(long, room(host=16 << 30), "auto") == Choice(tier="host", fused=False, ahead=1)


def test_what_spares_more_bytes_is_preferred_where_not_both_fit() -> None:
    """128 x 2048 tokens are 4.3 GB of hidden states, 8 x 128 are 17 MB; a block is 1.7 GB either way."""
    long = list(preferences(scale_70b(Wanda(), unified=True), room(), "disk"))
    short = list(preferences(WANDA_ON_CPU, room(), "disk"))
    all_three = Choice(tier="disk", fused=True, ahead=2)
    both, none = Choice(tier="disk", fused=True, ahead=1), Choice(tier="disk", fused=False, ahead=0)
    fused, ahead = Choice(tier="disk", fused=True, ahead=0), Choice(tier="disk", fused=False, ahead=1)
    assert long == [all_three, both, fused, ahead, none]
    assert short == [all_three, both, ahead, fused, none]


def test_queues_to_the_spool_are_deep_where_there_is_room() -> None:
    wide = choose(WANDA_ON_CPU, room(), "disk")
    assert wide == Choice(tier="disk", fused=True, ahead=2, depth=DEEP)
    most = max(phase.bytes_in("host") for phase in footprint(WANDA_ON_CPU, wide, room().baseline))
    assert choose(WANDA_ON_CPU, room(host=most), "disk") == wide
    assert choose(WANDA_ON_CPU, room(host=most - 1), "disk") == replace(wide, depth=2)


@pytest.mark.parametrize("scale", [WANDA_ON_CPU, scale_70b(SparseGPT())])
def test_a_tier_that_is_asked_for_is_taken(scale: Scale) -> None:
    choice = choose(scale, room(), "device")
    assert choice == Choice(tier="device", fused=False, ahead=1)


def test_the_promised_ceilings_hold_70b_shapes_on_a_cpu() -> None:
    """8 x 128 tokens, hidden states on disk: Wanda under 6 GiB, BESA under 8 GiB."""
    for scale, ceiling in ((WANDA_ON_CPU, 6 << 30), (BESA_ON_CPU, 8 << 30)):
        assert choose(scale, room(host=ceiling), "disk") is not None


@pytest.mark.parametrize("ceiling", [n << 30 for n in (2, 3, 4, 6, 8, 12, 20)])
def test_a_choice_never_passes_a_ceiling(ceiling: int) -> None:
    limits = room(host=ceiling)
    for scale in (WANDA_ON_CPU, BESA_ON_CPU, scale_70b(Wanda()), scale_70b(Besa())):
        choice = choose(scale, limits, "auto")
        if choice is not None:
            assert max(p.bytes_in("host") for p in footprint(scale, choice, BASELINE)) <= ceiling
            assert refusal(scale, limits, "auto", HALF) == ()
        else:
            assert refusal(scale, limits, "auto", HALF)


def test_a_refusal_says_which_phase_needs_how_much_of_what_and_what_holds_it() -> None:
    (told,) = refusal(BESA_ON_CPU, room(host=3 << 30), "auto", HALF)
    assert told.startswith("prune needs ")
    assert "above memory.host: 3.22 GB. It holds work of besa " in told
    assert ", weights 1.71 GB, interpreter and libraries 524 MB" in told


def test_the_ceiling_that_a_refusal_names_is_enough_and_a_little_less_is_not() -> None:
    (told,) = refusal(BESA_ON_CPU, room(host=3 << 30), "auto", HALF)
    mebibytes = int(re.search(r"memory\.host: (\d+)MiB", told)[1])  # type: ignore[index]
    assert choose(BESA_ON_CPU, room(host=mebibytes << 20), "auto") is not None
    assert choose(BESA_ON_CPU, room(host=(mebibytes - 1) << 20), "auto") is None


def test_every_setting_that_a_refusal_names_is_enough_by_itself() -> None:
    crowded = scale_70b(Wanda(), work=replace(LLAMA_70B, batch=16))
    limits = room(device=10 << 30, spool=10**9, host=6 << 30)
    told = " ".join(refusal(crowded, room(device=8 << 30), "auto", HALF))
    batch = int(re.search(r"compute\.batch: (\d+)", told)[1])  # type: ignore[index]
    assert 1 <= batch < 16
    assert choose(replace(crowded, work=replace(crowded.work, batch=batch)), room(device=8 << 30), "auto")
    assert not choose(replace(crowded, work=replace(crowded.work, batch=batch + 1)), room(device=8 << 30), "auto")

    single = scale_70b(Wanda())
    told = " ".join(refusal(single, limits, "auto", HALF))
    count = int(re.search(r"calibration\.sequences: (\d+)", told)[1])  # type: ignore[index]
    assert choose(replace(single, work=replace(single.work, num_sequences=count)), limits, "auto")
    assert not choose(replace(single, work=replace(single.work, num_sequences=count + 1)), limits, "auto")


def test_a_refusal_offers_the_disk_where_memory_was_asked_for_and_another_recipe_where_that_would_do() -> None:
    long = scale_70b(Wanda(), unified=True)
    (told,) = refusal(long, room(host=6 << 30), "host", HALF)
    assert "memory.activations: disk" in told
    (told,) = refusal(scale_70b(SparseGPT(), unified=True, work=SMALL), room(host=6 << 30), "auto", HALF)
    assert "prune.recipe: [wanda]" in told
    assert "compute.batch" not in told
    assert "calibration.sequences" not in told


def test_what_a_machine_has_cannot_be_raised() -> None:
    limits = replace(room(), limits={"host": Limit(num_bytes=1 << 30)})
    (told,) = refusal(WANDA_ON_CPU, limits, "auto", HALF)
    assert "above all that this machine has free (host): 1.07 GB" in told
    assert told.endswith(
        "What would do: no single setting would make it fit: lower several of them, or prune elsewhere"
    )


def test_each_limit_that_is_passed_is_told() -> None:
    choice = Choice(tier="disk", fused=False, ahead=0)
    limits = room(device=1, spool=2)
    assert set(exceeded(scale_70b(Wanda()), choice, limits)) == {"device", "spool"}
    lines = refusal(scale_70b(Wanda()), limits, "disk", HALF)
    assert len(lines) == 2
    assert "memory.spool_limit: 4096MiB" in lines[1]


WRITTEN = Generation(num_sequences=128, batch=16, numel=69 * 10**9, cache_numel=2 * 80 * 1024, stored_bytes=138 * 10**9)


def test_where_only_the_writing_of_calibration_text_does_not_fit_another_source_is_the_way_out() -> None:
    writing, tight = replace(WANDA_ON_CPU, generation=WRITTEN), room(host=20 << 30)
    assert refusal(WANDA_ON_CPU, tight, "auto", HALF) == ()
    (line,) = refusal(writing, tight, "auto", HALF)
    assert line.startswith(
        "generate needs 139 GB (host), 118 GB above memory.host: 21.5 GB. It holds weights of the whole"
    )
    assert line.endswith(f"MiB; or {ANOTHER_SOURCE}")
    (raised,) = re.findall(r"memory.host: (\d+)MiB", line)
    assert refusal(writing, room(host=int(raised) << 20), "auto", HALF) == ()


def test_a_model_that_writes_on_a_gpu_draws_its_tokens_on_the_host() -> None:
    phases = footprint(replace(scale_70b(Wanda()), generation=WRITTEN), Choice(tier="host", fused=False, ahead=0), 0)
    generate = phases[0]
    cache = 16 * 2048 * WRITTEN.cache_numel
    assert (generate.name, generate.bytes_in("device") > 2 * (WRITTEN.numel + cache)) == ("generate", True)
    assert generate.bytes_in("host") < 1 << 27
