"""Calibration text that the model writes itself, once: kept in the run directory, and read from there ever after.

    calibration: {source: self, sequences: 16, tokens: 256, seed: 0}
    calibration: {source: {self: {temperature: 1.0, top_k: 50, batch: 16}}, ...}
    calibration: {source: {self: {continues: {text: FILE}, given: 16}}, sequences: 112, ...}

With `continues` the first sequences are those of a text as they are, and the model goes on from passages of these: more
to learn from where there is little text, which keeps `reconstruct` from learning it by heart.

It is durable before pruning begins, so a run that goes on, even on another machine, is calibrated on the same tokens.
The file is one that `{tokens: FILE}` reads.
"""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import torch
from pydantic import JsonValue
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pipeline.calibration import CalibrationSet, digest, load_calibration, load_tokenizer, require_in_vocabulary
from pipeline.config import RunConfig
from pipeline.durable import write_atomically
from pipeline.errors import BudgetExceeded, CalibrationError, ConfigChanged, RunDirectoryError, RunStopped
from pipeline.human import human_seconds
from pipeline.ledger import TOKENS_NAME
from pipeline.meter import resident_bytes
from pipeline.own_text import SelfOptions, WrittenByModel
from pipeline.planning.fitting import ANOTHER_SOURCE, beyond
from pipeline.planning.footprint import Choice, footprint
from pipeline.planning.plan import LATER_BYTES, room_for
from pipeline.planning.scale import scale_of
from pipeline.progress import Progress, StopAsked
from pipeline.sampler import sample_sequences
from pipeline.skeleton import Skeleton
from pipeline.sources import describe

SECONDS_BETWEEN_LINES = 15.0
"""How often the log tells how far the model has come."""

SHOWN_CHARACTERS = 200
"""Of the text that has been written."""


def self_calibration(
    config: RunConfig, skeleton: Skeleton, progress: Progress, stop_asked: StopAsked
) -> CalibrationSet:
    """Return what a run's model has written, or have it write now; the caller holds the run directory's lock.

    Raises BudgetExceeded where the whole model does not fit, ConfigChanged where the run directory holds text that was
    written with other settings, RunStopped between two tokens once `stop_asked()` is true: then nothing is kept.
    """
    given_NT = _given(config, skeleton)
    path, settings = config.output / TOKENS_NAME, _settings(config, skeleton, given_NT)
    if path.is_file():
        tokens_NT = _read(path, settings)
    else:
        _require_room(config, skeleton)
        tokens_NT = _write(config, skeleton, given_NT, progress, stop_asked)
        content = save({"tokens": tokens_NT}, {"settings": json.dumps(settings, sort_keys=True)})
        write_atomically(path, content)
        shown = beginning(tokens_NT[len(given_NT) :], skeleton.checkpoint.directory)
        progress.say(f"the model wrote, for instance: {shown!r}")
    require_in_vocabulary(tokens_NT, skeleton.vocab_size, str(path))
    continues = _options(config).continues
    first = f"{len(given_NT)} sequences of {describe(continues)} and " if continues else ""
    num_written, num_tokens = len(tokens_NT) - len(given_NT), tokens_NT.shape[1]
    description = f"{first}{num_written} sequences x {num_tokens} tokens that the model wrote itself"
    return CalibrationSet(
        tokens_NT=tokens_NT, sha256=digest(tokens_NT), description=f"{description} (seed {config.calibration.seed})"
    )


def beginning(tokens_NT: torch.Tensor, tokenizer_directory: Path) -> str:
    """Return the first characters of the first sequence; its ids where the directory holds no tokenizer."""
    first = tokens_NT[0, :SHOWN_CHARACTERS].tolist()
    with suppress(CalibrationError):
        return str(load_tokenizer(tokenizer_directory).decode(first))[:SHOWN_CHARACTERS]
    return " ".join(str(token) for token in first)[:SHOWN_CHARACTERS]


def _options(config: RunConfig) -> SelfOptions:
    assert isinstance(config.calibration.source, WrittenByModel)
    return config.calibration.source.self


def _given(config: RunConfig, skeleton: Skeleton) -> torch.Tensor:
    """The sequences that come first, as they are in a text, int64 [G, T]; none where the model writes all."""
    calibration, options = config.calibration, _options(config)
    if options.continues is None or options.given is None:
        return torch.empty(0, calibration.tokens, dtype=torch.int64)
    asked = calibration.model_copy(update={"source": options.continues, "sequences": options.given})
    return load_calibration(asked, skeleton.checkpoint.directory, skeleton.vocab_size).tokens_NT


def prompts_of(given_NT: torch.Tensor, num_sequences: int, length: int) -> torch.Tensor:
    """Return what so many sequences go on from, int64 [num_sequences, length]: a passage of each given one in turn.

    After every round the passages are those that follow; where none do, the first again.
    """
    num_given, num_tokens = given_NT.shape
    numbers_N = torch.arange(num_sequences)
    first_N1 = (numbers_N // num_given * length % (num_tokens - length + 1))[:, None]
    return given_NT[numbers_N % num_given].gather(1, first_N1 + torch.arange(length))


def _settings(config: RunConfig, skeleton: Skeleton, given_NT: torch.Tensor) -> dict[str, JsonValue]:
    """What the tokens depend on, but for rounding."""
    calibration, options = config.calibration, _options(config)
    own: dict[str, JsonValue] = options.model_dump(mode="json", exclude={"continues", "given", "prompt"})
    if len(given_NT):
        own |= {"given": len(given_NT), "prompt": options.prompt, "continues": digest(given_NT)}
    shape: dict[str, JsonValue] = {"sequences": calibration.sequences, "tokens": calibration.tokens}
    return shape | {
        "seed": calibration.seed,
        "model": skeleton.checkpoint.fingerprint(),
        **own,
    }


def _write(
    config: RunConfig, skeleton: Skeleton, given_NT: torch.Tensor, progress: Progress, stop_asked: StopAsked
) -> torch.Tensor:
    calibration, options = config.calibration, _options(config)
    shape = calibration.sequences - len(given_NT), calibration.tokens
    prompts_NP = prompts_of(given_NT, shape[0], options.prompt) if len(given_NT) else None
    pace = Pace(shape[0] * shape[1], progress.say)

    def after_tokens(count: int) -> None:
        if stop_asked():
            raise RunStopped(
                f"stopped as asked while the model wrote its calibration text: {pace.num_written:,} of "
                f"{pace.num_wanted:,} tokens, which are not kept. Begin it anew with: secateur run {config.output}"
            )
        pace.count(count)

    written_NT = sample_sequences(skeleton, *shape, options, calibration.seed, after_tokens, prompts_NP)
    return torch.cat([given_NT, written_NT])


class Pace:
    """Says now and then how many tokens have been written, and how long the rest will take."""

    def __init__(self, num_wanted: int, say: Callable[[str], None], clock: Callable[[], float] = perf_counter) -> None:
        self.num_wanted, self.num_written = num_wanted, 0
        self._say, self._clock = say, clock
        self._began = self._said = clock()

    def count(self, num_tokens: int) -> None:
        """Take in that so many tokens more have been written."""
        self.num_written += num_tokens
        now = self._clock()
        if now - self._said >= SECONDS_BETWEEN_LINES and self.num_written < self.num_wanted:
            self._said = now
            left = (now - self._began) / self.num_written * (self.num_wanted - self.num_written)
            self._say(
                f"the model writes its calibration text: {self.num_written:,} of {self.num_wanted:,} tokens "
                f"({human_seconds(left)} left)"
            )


def _require_room(config: RunConfig, skeleton: Skeleton) -> None:
    """Hold the whole model against the ceilings, or where there are none against what is free."""
    baseline = resident_bytes() + LATER_BYTES
    phases = footprint(scale_of(config, skeleton), Choice(tier="host", fused=False, ahead=0), baseline)
    (generate,) = (phase for phase in phases if phase.name == "generate")
    refused = beyond(generate, room_for(config, skeleton.device, baseline), [ANOTHER_SOURCE])
    if refused:
        raise BudgetExceeded("\n".join(refused))


def _read(path: Path, settings: dict[str, JsonValue]) -> torch.Tensor:
    """The tokens of an earlier session, int64 [N, T]; raises ConfigChanged where it wrote with other settings."""
    try:
        with safe_open(path, framework="pt") as file:
            written_with = json.loads(file.metadata()["settings"])
            tokens_NT: torch.Tensor = file.get_tensor("tokens")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(
            f"{path} is not what the model wrote: {error}; restore the file, or remove it where no block is committed, "
            "and the model writes anew"
        ) from error
    changed = [name for name in settings if written_with.get(name) != settings[name]]
    if changed:
        differences = ", ".join(f"{name} {written_with.get(name)}, now {settings[name]}" for name in changed)
        raise ConfigChanged(
            f"{path} was written with other settings of `calibration`, or by another model: {differences}; go back to "
            "them, or name another output directory"
        )
    return tokens_NT
