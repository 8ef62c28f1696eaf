"""What handing on the dense stream costs in quality: both handoffs, several recipes and sparsities, three seeds.

    python -m tests.bench.handoffs MODEL RESULTS.jsonl --calibrate valid.txt --evaluate test.txt [--stages 3]

Stages run one after the other in this process, through the same code as on a cluster and with the same bits. Every
run is a line of RESULTS.jsonl; a run that is there already is not made again. Prints the table of the README.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cluster.job import scheme_of
from cluster.topology import Topology, partition
from pipeline import run as whole
from pipeline.activations import Boundary
from pipeline.allocate import allocate
from pipeline.config import RunConfig, parse_config
from pipeline.inputs import embed_tokens, run_dense_blocks
from pipeline.job import Job, finish, open_job, open_source, order_of
from pipeline.ledger import RunLock
from pipeline.memory import unlimited
from pipeline.peers import Alone
from pipeline.progress import Silent
from pipeline.run import LedgerBook
from pipeline.shelf import ModelDirectory
from pipeline.stage import run_stage
from pipeline.transaction import Streams, Transaction

SEEDS = (0, 1, 2)
RECIPES: dict[str, tuple[float | str, ...]] = {
    "wanda": (0.5, 0.7, "2:4"),
    "sparsegpt": (0.5, 0.7, "2:4"),
    "besa": (0.5, 0.7),
}
"""BESA learns how much each row drops, which 2:4 fixes."""


def wanted(stages: int) -> Iterator[dict[str, Any]]:
    """Yield what is to be run, in order: a whole table for one seed, then for the next."""
    for seed in SEEDS:
        for recipe, sparsities in RECIPES.items():
            for sparsity in sparsities:
                for count in (1, stages):
                    yield {"recipe": recipe, "sparsity": sparsity, "stages": count, "seed": seed}


def perplexity_of(run: dict[str, Any], asked: argparse.Namespace) -> float:
    """Carry out one run and return its perplexity on the evaluation text."""
    with tempfile.TemporaryDirectory() as output:
        config = parse_config(
            {
                "model": str(asked.model.absolute()),
                "output": f"{output}/run",
                "calibration": {
                    "source": {"text": str(asked.calibrate.absolute())},
                    "sequences": 16, "tokens": 256, "sample": "random", "seed": run["seed"],
                },
                "prune": {"sparsity": run["sparsity"], "recipe": [run["recipe"]]},
                "compute": {"dtype": "float32", "threads": asked.threads},
                "evaluate": {"text": str(asked.evaluate.absolute()), "sequence_length": 512, "windows": 24},
            },
            "the bench",
        )  # fmt: skip
        perplexity = run_in_stages(config, run["stages"])
    assert perplexity is not None
    return perplexity


def run_in_stages(config: RunConfig, num_stages: int) -> float | None:
    """Prune with the dense handoff, a stage after the other; one stage is the exact run."""
    with RunLock(config.output), open_source(config, Silent(), lambda: False, whole.run) as source:
        stages = partition([1.0] * source.skeleton.num_blocks, num_stages)
        scheme = scheme_of(Topology(stages=stages, replicas=1, handoff="dense"))
        memory = unlimited()
        job = open_job(source, memory, Silent(), lambda: False, scheme=scheme)
        tokens_NT, batch = source.calibration.tokens_NT, config.compute.batch
        boundary = embed_tokens(source.skeleton, tokens_NT, batch, memory.store, "dense")
        for blocks in stages:
            prune_stage(job, boundary, blocks)
            run_dense_blocks(source.skeleton, boundary, blocks, batch, memory)
        return finish(job).perplexity_after


def prune_stage(job: Job, boundary: Boundary, blocks: range) -> None:
    """Prune the blocks of one stage, starting from the dense hidden states before it."""
    order = order_of(job.config, allocate(job), job.source.shape)
    store, shelf = job.memory.store, ModelDirectory(job.model_directory)
    dense = store.copy("targets", boundary) if order.recipe.needs_dense_stream else None
    streams = Streams(pruned=store.copy("pruned", boundary), dense=dense)
    with Transaction(job.skeleton, order, streams, shelf, Silent(), Alone(), job.memory) as transaction:
        run_stage(transaction, blocks, {}, LedgerBook(job, num_committed=0))


def table(results: list[dict[str, Any]], stages: int) -> str:
    """Return the README's table: mean and spread of perplexity over the seeds, and how the handoffs compare."""
    lines = [f"| recipe | sparsity | `pruned` | `dense`, {stages} stages | ratio |", "|---|---|---|---|---|"]
    for recipe, sparsities in RECIPES.items():
        for sparsity in sparsities:
            found = {
                (r["stages"], r["seed"]): r["perplexity"]
                for r in results
                if (r["recipe"], r["sparsity"]) == (recipe, sparsity)
            }
            both = [(found[1, s], found[stages, s]) for s in SEEDS if (1, s) in found and (stages, s) in found]
            if both:
                exact, dense = ([pair[i] for pair in both] for i in (0, 1))
                ratio = statistics.mean(d / e for e, d in both)
                asked = f"{sparsity:.0%}" if isinstance(sparsity, float) else sparsity
                lines.append(f"| {recipe} | {asked} | {spread(exact)} | {spread(dense)} | {ratio:.3f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Return mean and range over the seeds."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, required=True)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results = [json.loads(line) for line in asked.results.read_text().splitlines()] if asked.results.exists() else []
    for run in wanted(asked.stages):
        if any(run.items() <= result.items() for result in results):
            continue
        results.append({**run, "perplexity": perplexity_of(run, asked)})
        with asked.results.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
    sys.stdout.write(table(results, asked.stages) + "\n")


if __name__ == "__main__":
    main()
