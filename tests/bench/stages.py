"""Time and quality of a job over 1 to 5 stages on this machine, both handoffs, beside what was forecast.

    python -m tests.bench.stages MODEL --calibrate valid.txt [--evaluate test.txt] [--recipe wanda]

Every worker has one thread, so no more workers are at work than there are cores: stages beyond that share them, which
the forecast (made from the run of one worker) does not know. Time is from the first phase of a worker to the last.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cluster.forecast import Forecast, Links
from cluster.job import TRACE, run_on_cluster
from cluster.ray_cluster import joined
from cluster.topology import Topology, partition
from pipeline.cluster_config import ClusterConfig, Handoff
from pipeline.config import parse_config
from pipeline.progress import Silent
from tests.bench.scaling import predict

RECIPES = ("wanda", "besa")
LAYOUTS: list[tuple[Handoff, int, int]] = [
    ("pruned", 1, 1),
    *(("pruned", count, 1) for count in (2, 3, 5)),
    *(("dense", count, 1) for count in (2, 3, 5)),
    ("pruned", 1, 2),
]
"""Handoff, stages, replicas; the first is what the others are held against."""

SEQUENCES, TOKENS, BATCH = 16, 256, 4
LOCAL = Links(handoff_bytes_per_s=1e9, allreduce_bytes_per_s=1e9)


def settings(asked: argparse.Namespace, recipe: str, output: str, layout: tuple[Handoff, int, int]) -> dict[str, Any]:
    """Return a run's configuration as plain data."""
    handoff, stages, replicas = layout
    heldout = {} if asked.evaluate is None else {"text": str(asked.evaluate.absolute()), "windows": 24}
    return {
        "evaluate": heldout or None,
        "model": str(asked.model.absolute()),
        "output": output,
        "calibration": {
            "source": {"text": str(asked.calibrate.absolute())}, "sequences": SEQUENCES, "tokens": TOKENS,
        },
        "prune": {"sparsity": 0.5, "recipe": [recipe]},
        "compute": {"dtype": "float32", "threads": 1, "batch": BATCH},
        "cluster": {"address": "local", "handoff": handoff, "stages": stages, "replicas": replicas},
    }  # fmt: skip


def busy_seconds(run_directory: Path) -> float:
    """Return the time from the first phase of a worker to the last, from the trace."""
    events = [event for event in json.loads((run_directory / "report" / TRACE).read_bytes())["traceEvents"]]
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in events if event["ph"] == "X"]
    return float(max(end for _, end in spans) - min(start for start, _ in spans)) / 1e6


def expected(report: dict[str, Any], layout: tuple[Handoff, int, int], weight_bytes: int, width: int) -> Forecast:
    """Return the forecast of a layout from the report of the run of one worker."""
    handoff, stages, replicas = layout
    num_blocks = int(report["num_blocks"])
    topology = Topology(stages=partition([1.0] * num_blocks, stages), replicas=replicas, handoff=handoff)
    boundary = SEQUENCES * TOKENS * width * 4
    return predict(
        report,
        topology,
        LOCAL,
        num_sequences=SEQUENCES,
        batch=BATCH,
        weight_bytes=weight_bytes,
        boundary_bytes=boundary,
    )


def main() -> None:
    """Measure all layouts and print a table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, help="text for perplexities; without it only time is measured")
    parser.add_argument("--recipe", choices=RECIPES, action="append")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = json.loads((asked.model / "config.json").read_text())
    sys.stdout.write(
        "| recipe | handoff | stages x replicas | seconds | speed-up | forecast | perplexity |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    with joined(ClusterConfig(address="local"), max(stages * replicas for _, stages, replicas in LAYOUTS)):
        for recipe in asked.recipe or RECIPES:
            alone: dict[str, Any] = {}
            for layout in LAYOUTS:
                with tempfile.TemporaryDirectory() as directory:
                    config = parse_config(settings(asked, recipe, f"{directory}/run", layout), "the bench")
                    report = run_on_cluster(config, Silent(), lambda: False).as_json()
                    seconds = busy_seconds(config.output)
                alone = alone or {**report, "busy": seconds, "num_blocks": model["num_hidden_layers"]}
                weights = report["prunable_weights"] // model["num_hidden_layers"] * 4
                forecast = expected(alone, layout, weights, model["hidden_size"])
                handoff, stages, replicas = layout
                perplexity = report["perplexity_after"]
                sys.stdout.write(
                    f"| {recipe} | {handoff} | {stages} x {replicas} | {seconds:.1f} | {alone['busy'] / seconds:.2f} | "
                    f"{forecast.speed_up:.2f} | {'' if perplexity is None else f'{perplexity:.2f}'} |\n"
                )
                sys.stdout.flush()


if __name__ == "__main__":
    main()
