"""What a finished run has to say: sparsity, quality, cost, and what will and will not run faster."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import JsonValue, TypeAdapter

from pipeline.attention import HeadLayout
from pipeline.block_widths import width_in_words
from pipeline.ledger import Ledger
from pipeline.memory import Traffic
from pipeline.meter import PeakMeter
from pipeline.records import Commit

REPORT = "report.json"

HOW_TO_LOAD = (
    "Its blocks have widths of their own (per_layer_config in config.json), which transformers and other runtimes do "
    "not build: they refuse the model. Load it with secateur: `from pipeline.uneven import load; model = "
    'load("DIRECTORY")`; `secateur evaluate` and further runs open it as any other.'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Smaller:
    """What a model has lost for good, counted from its files."""

    asked: float
    """Part of the blocks' parameters that was to go."""

    blocks: dict[str, JsonValue]
    """Which blocks went and why, by their numbers in the dense model, and how large that is."""

    num_blocks: int
    """That are left."""

    parameters: int
    num_bytes: int
    """Of all tensors that are left."""

    @property
    def heads(self) -> str | None:
        """What is left of every attention, in words; None where all is."""
        heads = self.blocks.get("heads")
        return None if heads is None else str(TypeAdapter(HeadLayout).validate_python(heads))


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A run in figures."""

    sparsity: str
    """What was asked for."""

    pruned_weights: int
    prunable_weights: int
    """Weights of all linears that were to be pruned."""

    block_sparsity: list[float]
    """Fraction of each block's prunable weights masked; 0 where none were to be."""

    mean_error: float
    """Mean over blocks of the relative error of the pruned block's output."""

    perplexity_before: float | None
    perplexity_after: float | None

    seconds: dict[str, float]
    """Wall clock by phase, over all blocks and all sessions of the run."""

    forward_equivalents: float | None
    """Cost in forward passes of all calibration sequences through all blocks (a pass is what `propagate` takes a
    block, times all blocks); None where no block was propagated."""

    peak_host_bytes: int
    peak_device_bytes: int
    """High-water marks of the session that finished the run."""

    peaks: dict[str, dict[str, int]]
    """The same by place (`host`, `device`) and phase; on a cluster those of the coordinator."""

    traffic: dict[str, float]
    """Bytes of weights and hidden states moved in that session, and seconds spent waiting for them."""

    planned: dict[str, dict[str, float]]
    """Figures of that session beside those of its plan."""

    notes: dict[str, float]
    """Extremes of what the methods noted, such as the largest damping."""

    linears: dict[str, dict[str, float]]
    """All that they noted (swaps, errors, damping), by block and linear: `3.mlp.up_proj`; `3.neurons` and `3.heads` of
    what was taken out of a block."""

    smaller: Smaller | None = None
    """What the model has lost for good; None where zeros take the place of what was pruned."""

    @property
    def achieved(self) -> float:
        """Fraction of prunable weights masked, of those that are left."""
        return self.pruned_weights / self.prunable_weights if self.prunable_weights else 0.0

    def as_json(self) -> dict[str, Any]:
        """Return plain data for report.json."""
        return {**asdict(self), "achieved_sparsity": self.achieved, "guidance": guidance(self)}


def build_report(
    ledger: Ledger,
    num_blocks: int,
    meter: PeakMeter,
    traffic: Traffic,
    planned: dict[str, dict[str, float]],
    smaller: Smaller | None = None,
) -> Report:
    """Gather the figures of a run whose blocks are all committed."""
    commits = [ledger.commits[index] for index in range(num_blocks)]
    records = [record for commit in commits for record in commit.linears.values()]
    seconds: dict[str, float] = {}
    for commit in commits:
        for phase, spent in commit.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    # The last block of all is never propagated, nor is the last of a stage that hands nothing on.
    propagated = [v for i in range(num_blocks) if isinstance(v := ledger.notes.get(f"propagate.{i}"), float)]
    seconds["propagate"] = sum(propagated)
    one_pass = sum(propagated) / len(propagated) * num_blocks if propagated else None
    return Report(
        sparsity=_asked(ledger),
        pruned_weights=sum(record.pruned for record in records),
        prunable_weights=sum(record.numel for record in records),
        block_sparsity=[_removed(commit) for commit in commits],
        mean_error=sum(commit.error for commit in commits) / num_blocks,
        perplexity_before=_perplexity(ledger, "before"),
        perplexity_after=_perplexity(ledger, "after"),
        seconds=seconds,
        forward_equivalents=sum(seconds.values()) / one_pass if one_pass else None,
        peak_host_bytes=meter.peak_host_bytes,
        peak_device_bytes=meter.peak_device_bytes,
        peaks={"host": dict(meter.host), "device": dict(meter.device)},
        traffic=asdict(traffic),
        planned=planned,
        notes=_extremes([note for commit in commits for note in _notes(commit).values()]),
        linears={f"{commit.block}.{name}": notes for commit in commits for name, notes in _notes(commit).items()},
        smaller=smaller,
    )


def guidance(report: Report) -> list[str]:
    """Say honestly what was done to size and speed."""
    return ([] if report.smaller is None else _of_smaller(report.smaller)) + (
        _of_zeros(report.sparsity) if report.prunable_weights else []
    )


def told_of_trials(tried: Mapping[str, JsonValue], num_dropped: int) -> str:
    """Say what trials of several splits between blocks and neurons have found, and which was taken."""
    perplexity = tried["perplexity"]
    assert isinstance(perplexity, dict)
    found = ", ".join(f"{value:.2f} without {number}" for number, value in perplexity.items())
    return (
        f"How much goes with whole blocks was found by {len(perplexity)} trial runs, whose perplexity on "
        f"{tried['sequences']} calibration sequences held out from them was, by the number of blocks: {found}; "
        f"{tried['dense']:.2f} before. Taken: without {num_dropped}."
    )


def _of_smaller(smaller: Smaller) -> list[str]:
    width, neurons = smaller.blocks.get("width"), smaller.blocks.get("neurons")
    is_smaller = smaller.parameters < smaller.blocks["parameters_before"]  # type: ignore[operator]  # a number
    heads = "" if smaller.heads is None else f" and {smaller.heads}"
    each = "" if width is None else f", with {width_in_words(width)} of {neurons} neurons{heads} each"
    what = "blocks" if width is None else "parameters"
    dropped, tried = smaller.blocks["dropped"], smaller.blocks.get("tried")
    assert isinstance(dropped, list)
    trials = [told_of_trials(tried, len(dropped))] if isinstance(tried, dict) else []
    silenced = _of_silenced(smaller.blocks)
    if not is_smaller:
        return [*silenced, *trials]
    left = f"The model is really smaller: {smaller.num_blocks} of {smaller.blocks['of']} blocks are left{each}."
    takes = f"takes less memory and time on any hardware, about in proportion to its {what}."
    if isinstance(width, list):
        return [f"{left} It {takes}", HOW_TO_LOAD, *silenced, *trials]
    return [f"{left} It loads in stock transformers, and {takes}", *silenced, *trials]


def _of_silenced(blocks: dict[str, JsonValue]) -> list[str]:
    silent = blocks.get("attentions_silenced")
    if not isinstance(silent, list):
        return []
    return [
        f"The attention of {len(silent)} of {blocks['of']} blocks ({', '.join(map(str, silent))}) is silenced: its "
        f"output projection is zero. Stock runtimes store and run it as before, so its {blocks['parameters_idle']:,} "
        "parameters count as idle, not as gone, and nothing is smaller or faster for it."
    ]


def _of_zeros(sparsity: str) -> list[str]:
    common = "The files are as large as before: zeros are stored, so that every runtime loads the model."
    if ":" not in sparsity:
        return [
            common,
            "Inference is as fast as before: GPUs and the usual runtimes do not skip scattered zeros.",
            "It pays where zeros are exploited: sparse CPU kernels (at 70% and above), compressed storage or "
            "transfer, or as the start of structured pruning.",
        ]
    if sparsity == "2:4":
        return [
            common,
            "NVIDIA GPUs from Ampere on can run 2:4 matrices up to about 1.6x faster (torch.sparse semi-structured), "
            "for large batches; one-token decoding gains nothing. vLLM no longer has 2:4 kernels.",
        ]
    return [common, f"No common hardware accelerates {sparsity}: only 2:4 has kernels."]


def _asked(ledger: Ledger) -> str:
    prune = ledger.header.config["prune"]
    assert isinstance(prune, dict)
    return f"{prune['sparsity']} by outliers" if "allocation" in prune else str(prune["sparsity"])


def _removed(commit: Commit) -> float:
    records = commit.linears.values()
    return sum(record.pruned for record in records) / max(1, sum(record.numel for record in records))


def _perplexity(ledger: Ledger, when: str) -> float | None:
    note = ledger.notes.get(f"perplexity.{when}")
    return float(value) if isinstance(note, dict) and isinstance(value := note["perplexity"], float) else None


def _notes(commit: Commit) -> dict[str, dict[str, float]]:
    """What methods noted of one block, by linear, and of its neurons and heads."""
    cuts = {} if commit.cut is None else {"neurons": commit.cut, "heads": commit.cut.heads}
    units = {what: {f"{what}.{name}": value for name, value in cut.notes.items()} for what, cut in cuts.items() if cut}
    noted = {**units, **{name: record.notes for name, record in commit.linears.items()}}
    return {name: notes for name, notes in noted.items() if notes}


def _extremes(noted: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the smallest of every note named *_min and the largest of every other."""
    found: dict[str, list[float]] = {}
    for notes in noted:
        for name, value in notes.items():
            found.setdefault(name, []).append(value)
    return {name: min(v) if name.endswith("_min") else max(v) for name, v in found.items()}
