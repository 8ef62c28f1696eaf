"""Every error secateur raises on purpose: each states the fact, the numbers, the rule and the way out.

    SecateurError
    ├── ConfigError             a configuration that cannot be run; all its problems at once
    ├── CheckpointError         the source on disk is not what it claims to be
    │   ├── MalformedShard      a safetensors file whose header or size is wrong
    │   └── UnsupportedCheckpoint   a sound checkpoint of a kind we refuse (pickled, quantised, unknown family)
    ├── CalibrationError        text or tokens that cannot serve as calibration data
    ├── NumericsError           NaN, Inf, or a factorisation that failed at every damping
    ├── RunDirectoryError       the run directory is in use, of another job, or damaged
    │   ├── RunLocked           another process holds it
    │   └── ConfigChanged       it belongs to a run with other settings
    ├── StorageError            the disk is full, unwritable or gone
    ├── BudgetExceeded          a buffer would pass a ceiling of the `memory` section
    ├── StageFailed             a stage of a cluster job died of what would come again, too often, or found no room
    ├── SubmissionError         a Ray cluster's job server refuses, or knows no such job
    │   └── ClusterUnreachable  it does not answer
    ├── VerificationError       the written model is not what the ledger says
    ├── WatchError              a release cannot go on its way from source to publication
    │   ├── HubError            the hub cannot be reached, or refuses; it may answer later
    │   ├── NoRoom              disk or memory does not suffice for a release just now
    │   ├── ReleaseChanged      a release is no longer what it was when it was found
    │   ├── GateFailed          a pruned model is not good enough to be published
    │   └── StateError          the watcher's state is of another version, or damaged
    └── RunStopped              a signal asked for a stop; the run can go on from its last commit

Every class takes one string, so every class pickles: errors cross process boundaries unchanged.
"""


class SecateurError(Exception):
    """Root of the tree; `except SecateurError` is what the command line prints without a traceback."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(SecateurError):
    """A configuration that cannot be run; the message lists every problem with its key path."""


class CheckpointError(SecateurError):
    """The source on disk is incomplete or is not what it claims to be."""


class MalformedShard(CheckpointError):
    """A safetensors file whose header, offsets or size break the format's rules."""


class UnsupportedCheckpoint(CheckpointError):
    """A sound checkpoint of a kind that is refused: pickled, quantised, or of an unknown family."""


class CalibrationError(SecateurError):
    """Text or tokens that cannot serve as calibration or evaluation data."""


class NumericsError(SecateurError):
    """NaN or Inf where finite numbers are required, or a factorisation that failed at every damping."""


class RunDirectoryError(SecateurError):
    """The run directory cannot be used as asked."""


class RunLocked(RunDirectoryError):
    """Another process is working in the run directory."""


class ConfigChanged(RunDirectoryError):
    """The run directory belongs to a run with other settings; the message names the differing keys."""


class StorageError(SecateurError):
    """A write failed: the disk is full, unwritable or gone."""


class BudgetExceeded(SecateurError):
    """A buffer that would pass a ceiling of the `memory` section; the message says what holds the rest."""


class StageFailed(SecateurError):
    """A stage of a cluster job died of what would come again, died too often, or found no resources."""


class SubmissionError(SecateurError):
    """The job server of a Ray cluster refuses what is asked of it, or knows no such job."""


class ClusterUnreachable(SubmissionError):
    """The job server of a Ray cluster does not answer; a job there may well be going on."""


class VerificationError(SecateurError):
    """The written model is not what the ledger and the source say it must be."""


class WatchError(SecateurError):
    """A release cannot go on its way from source to publication."""


class HubError(WatchError):
    """The hub cannot be reached, or refuses; it may answer later."""


class NoRoom(WatchError):
    """Free disk or memory does not suffice for a release just now; it may later."""


class ReleaseChanged(WatchError):
    """A release is no longer what it was when it was found."""


class GateFailed(WatchError):
    """A pruned model is not good enough to be published; the message names every check that failed."""


class StateError(WatchError):
    """The watcher's state file is of another version, or damaged."""


class RunStopped(SecateurError):
    """A signal asked for a stop; everything committed is kept and the run can go on."""
