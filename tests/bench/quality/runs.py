"""Carries out runs of the quality bench: prunes in a process of its own, then evaluates all texts on what came out."""

import platform
import shutil
import subprocess
import time
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import pipeline
from pipeline.calibration import digest, load_tokenizer, text_windows
from pipeline.checkpoint import Checkpoint
from pipeline.config import EvaluateConfig, PruneConfig, validated
from pipeline.devices import choose_device, choose_dtype
from pipeline.errors import CalibrationError
from pipeline.evaluate import evaluate, load_windows
from pipeline.memory import unlimited
from pipeline.progress import Silent
from pipeline.skeleton import Skeleton
from pipeline.sources import TextFile, documents
from pipeline.sparsity import parse_sparsity
from tests.bench.measure import measure
from tests.bench.quality.plan import Bench, Run, shape_of
from tests.bench.quality.results import Figures, Result, code_digest
from tests.bench.quality.weighing import Weight, weigh

ROUNDING = 0.005
"""Share of the weights by which a run may miss its sparsity."""

SHAPE_ROUNDING = 0.02
"""The same where blocks and neurons go whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What all runs have in common."""

    bench: Bench
    """Its texts have absolute paths, its compute section a number of threads."""

    model: Path
    tokens_T: torch.Tensor
    """The whole calibration text, int64."""

    common: dict[str, Any]
    """What decides the figures of every run: model, texts, versions."""

    scratch: Path
    """A directory of its own, removed after every run."""

    code: str
    commit: str

    def facts(self, run: Run | None) -> dict[str, Any]:
        """Return all that decides a run's figures but the code; None is the dense model."""
        if run is None:
            return self.common
        recipe = self.bench.recipes[run.recipe]
        own = {**recipe.calibration, **({"continued": recipe.continued} if recipe.continued else {})}
        tokens = {} if "source" in own else {"tokens": digest(self.stretch(run))}
        return {**self.common, "prune": self.bench.prune_of(run), "calibration": {**own, **tokens}}

    def stretch(self, run: Run) -> torch.Tensor:
        """Return the seed's stretch of the calibration text, int64 [N, T]: seed 0 its first tokens, 1 those after.

        Raises CalibrationError where the text ends before.
        """
        begin, end = run.seed * run.num_tokens, (run.seed + 1) * run.num_tokens
        if end > len(self.tokens_T):
            raise CalibrationError(
                f"{run} needs tokens {begin} to {end} of the calibration text, which has {len(self.tokens_T)}; "
                "use more text, fewer seeds or a smaller size"
            )
        return self.tokens_T[begin:end].view(shape_of(run.size)).contiguous()

    def carry_out(self, run: Run | None) -> Result:
        """Make one run, or evaluate the dense model.

        Raises RuntimeError with the errors of a run that fails, and where other than the asked share of weights went.
        """
        facts = self.facts(run)
        figures = self._dense() if run is None else self._pruned(run)
        day = time.strftime("%Y-%m-%d", time.gmtime())
        return Result(run=run, facts=facts, code=self.code, figures=figures, commit=self.commit, day=day)

    def _pruned(self, run: Run) -> Figures:
        began = time.perf_counter()
        shutil.rmtree(self.scratch, ignore_errors=True)  # of a bench that was killed
        self.scratch.mkdir(parents=True)
        try:
            measured = measure(self._config(run))
            made = self.scratch / "run" / "model"
            weight = self._weight(run, made)
            require_achieved(run, measured.report["achieved_sparsity"], weight)
            perplexity = perplexities(made, self.bench)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
        return Figures(
            perplexity=perplexity,
            seconds=sum(measured.report["seconds"].values()),
            passes=measured.report["forward_equivalents"],
            peak=measured.beyond_imports,
            wall=time.perf_counter() - began,
            elapsed=measured.elapsed,
            weight=weight,
        )

    def _weight(self, run: Run, made: Path) -> Weight | None:
        """Weigh what a run has made, where its recipe removes parameters for good."""
        prune = validated(PruneConfig, self.bench.prune_of(run), run.recipe)
        if prune.steps.shape is None:
            return None
        compute, device = self.bench.compute, choose_device(self.bench.compute.device)
        with closing(Checkpoint.open(self.model)) as checkpoint:
            dtype = choose_dtype(compute.dtype, device, checkpoint.matrix_dtype())
        return weigh(self.model, made, dtype, device)

    def _dense(self) -> Figures:
        began = time.perf_counter()
        found = perplexities(self.model, self.bench)
        return Figures(perplexity=found, seconds=0.0, passes=0.0, peak=0, wall=time.perf_counter() - began)

    def _config(self, run: Run) -> dict[str, Any]:
        """Return a run's configuration, its tokens written where it finds them."""
        num_sequences, length = shape_of(run.size)
        recipe = self.bench.recipes[run.recipe]
        calibration: dict[str, Any] = {"sequences": num_sequences, "tokens": length, **recipe.calibration}
        if "source" in calibration:
            calibration["seed"] = run.seed
        else:
            file = self.scratch / "tokens.safetensors"
            save_file({"tokens": self.stretch(run)}, file)
            calibration["source"] = {"tokens": str(file)}
        if recipe.continued:
            calibration["source"] = {"self": {"continues": calibration["source"], "given": num_sequences}}
            calibration |= {"sequences": num_sequences + recipe.continued, "seed": run.seed}
        return {
            "model": str(self.model),
            "output": str(self.scratch / "run"),
            "calibration": calibration,
            "prune": self.bench.prune_of(run),
            "compute": self.bench.compute.model_dump(mode="json"),
        }


def open_workshop(bench: Bench, model: Path, data: Path, scratch: Path) -> Workshop:
    """Prepare the bench for a model, and for texts that lie in a directory."""
    threads = bench.compute.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    update = {
        "calibrate": in_directory(bench.calibrate, data),
        "evaluate": {name: placed(text, data) for name, text in bench.evaluate.items()},
        "compute": bench.compute.model_copy(update={"threads": threads}),
    }
    bench = bench.model_copy(update=update)
    package = Path(pipeline.__file__).parent
    return Workshop(
        bench=bench,
        model=model.absolute(),
        tokens_T=text_windows(next(documents(bench.calibrate)), load_tokenizer(model), 1, None).flatten(),
        common=common_facts(bench, model),
        scratch=scratch.absolute(),
        code=code_digest(package),
        commit=commit_of(package),
    )


def require_achieved(run: Run, achieved: float, weight: Weight | None = None) -> None:
    """Hold what was pruned against what was asked for, but for counts rounded: row by row, or to widths and blocks."""
    asked = parse_sparsity(run.sparsity).ratio
    rounding = ROUNDING if weight is None else SHAPE_ROUNDING
    achieved = achieved if weight is None else weight.part_removed + weight.part_idle
    if abs(achieved - asked) > rounding:
        raise RuntimeError(f"{achieved:.4f} of the weights were pruned instead of {asked:.4f}: no figures of {run}")


def placed(text: EvaluateConfig, data: Path) -> EvaluateConfig:
    """Return what to evaluate on, a file of text looked for in a directory."""
    source = text.source
    return text.model_copy(update={"source": in_directory(source, data)}) if isinstance(source, TextFile) else text


def in_directory(source: TextFile, data: Path) -> TextFile:
    """Return a file of text looked for in a directory."""
    return TextFile(text=(data / source.text).absolute())


def common_facts(bench: Bench, model: Path) -> dict[str, Any]:
    """Return what decides the figures of every run; plain data."""
    return {
        "model": fingerprint(model),
        "evaluate": {name: digest(load_windows(text, model)) for name, text in bench.evaluate.items()},
        "compute": bench.compute.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("torch", "transformers")}},
    }


def fingerprint(model: Path) -> str:
    """Return what tells a model from others."""
    with closing(Checkpoint.open(model)) as checkpoint:
        return checkpoint.fingerprint()


def perplexities(model: Path, bench: Bench) -> dict[str, float]:
    """Return a model's perplexity on every text of the bench."""
    compute = bench.compute
    device = choose_device(compute.device)
    found: dict[str, float] = {}
    with closing(Checkpoint.open(model)) as checkpoint:
        skeleton = Skeleton(checkpoint, device, choose_dtype(compute.dtype, device, checkpoint.matrix_dtype()))
        for name, text in bench.evaluate.items():
            windows_WL, batch = load_windows(text, model), compute.batch
            found[name] = evaluate(skeleton, windows_WL, batch, Silent(), name, lambda: None, unlimited())
    return found


def commit_of(package: Path) -> str:
    """Return the commit a package is at, `-dirty` where files differ from it; `unknown` outside a repository."""
    command = ["git", "-C", str(package), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
