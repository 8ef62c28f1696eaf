"""The README's table of results: perplexity of every recipe and sparsity on one model, same tokens for all.

    python -m tests.bench.quality MODEL --calibrate valid.txt --evaluate test.txt [--only besa]

Calibration: 16 x 256 tokens from the start of the text; evaluation: 24 windows of 512, in float32. Prints one line a
run as it ends, as a Markdown table.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.measure import measure

RUNS: list[tuple[float | str, list[Any]]] = [
    (0.5, ["magnitude"]),
    (0.5, ["wanda"]),
    (0.5, ["sparsegpt"]),
    (0.5, ["besa"]),
    (0.5, [{"besa": {"granularity": "linear"}}]),
    (0.5, ["besa", "sparsegpt"]),
    ("2:4", ["wanda"]),
    ("2:4", ["sparsegpt"]),
    (0.3, ["wanda"]),
    (0.3, ["besa"]),
    (0.7, ["wanda"]),
    (0.7, ["sparsegpt"]),
    (0.7, ["besa"]),
]


def line(sparsity: float | str, recipe: list[Any], report: dict[str, Any], beyond: int) -> str:
    """Return one row of the table."""
    names = ", ".join(step if isinstance(step, str) else json.dumps(step) for step in recipe)
    seconds = sum(report["seconds"].values())
    return (
        f"| {names} | {sparsity} | {report['perplexity_after']:.2f} | {seconds:.0f} s | "
        f"{report['forward_equivalents']:.1f} | {beyond / 1e9:.2f} GB |"
    )


def main() -> None:
    """Run the table, or the part of it that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, required=True)
    parser.add_argument("--only", default="", help="recipes whose text contains this")
    asked = parser.parse_args()
    sys.stdout.write(
        "| recipe | sparsity | perplexity | pruning | forward passes | memory |\n|---|---|---|---|---|---|\n"
    )
    for sparsity, recipe in RUNS:
        if asked.only not in json.dumps(recipe):
            continue
        with tempfile.TemporaryDirectory() as output:
            config = {
                "model": str(asked.model.absolute()),
                "output": f"{output}/run",
                "calibration": {"source": {"text": str(asked.calibrate.absolute())}, "sequences": 16, "tokens": 256},
                "prune": {"sparsity": sparsity, "recipe": recipe},
                "compute": {"dtype": "float32"},
                "evaluate": {"text": str(asked.evaluate.absolute()), "sequence_length": 512, "windows": 24},
            }
            measured = measure(config)
        sys.stdout.write(line(sparsity, recipe, measured.report, measured.beyond_imports) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
