"""Every error splitft raises on purpose, with the exit code the command line gives.

    SplitftError                 1
    ├── ConfigError              2   a configuration value or file
    ├── DataError                3   a data file, column or partition
    ├── ModelError               4   a model that cannot be loaded or split exactly
    ├── AdapterError             5   an adapter that does not fit the model or the rule
    ├── CheckpointError          6   a run folder, journal or checkpoint
    ├── ProtocolError            7   a message that breaks the protocol
    ├── CodecError               8   a tensor or packet a codec refuses
    ├── ResourceError            9   memory, disk or device
    ├── MissingExtraError       10   an optional package is not installed
    └── Interrupted            130   stopped by the user; the run can be resumed

Each says what was wrong and the value, what was allowed, and what to do next (`remedy`). One page each in `docs/errors.md`.
"""

from __future__ import annotations


class SplitftError(Exception):
    """Root of the tree. `message` says what was wrong, `remedy` what to do next."""

    exit_code = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class ConfigError(SplitftError):
    """A configuration file, field or override is wrong; `problems` holds one line per fault."""

    exit_code = 2

    def __init__(self, message: str, remedy: str = "", problems: tuple[str, ...] = ()) -> None:
        super().__init__(message, remedy)
        self.problems = problems

    def __str__(self) -> str:
        return " ".join((self.message, *(f"[{problem}]" for problem in self.problems), self.remedy)).strip()


class DataError(SplitftError):
    """A data file cannot be read or divided as asked."""

    exit_code = 3


class ModelError(SplitftError):
    """A model cannot be loaded, or splitting it would change what it computes."""

    exit_code = 4


class AdapterError(SplitftError):
    """An adapter does not fit the model, or factors that must agree do not."""

    exit_code = 5


class CheckpointError(SplitftError):
    """A run folder, journal or checkpoint is missing, damaged, or belongs to something else."""

    exit_code = 6


class ProtocolError(SplitftError):
    """A message is malformed, too large, or out of order."""

    exit_code = 7


class CodecError(SplitftError):
    """A codec refuses a tensor (not finite, wrong type) or a packet (wrong length, unknown)."""

    exit_code = 8


class ResourceError(SplitftError):
    """Memory, disk space or a device is not there."""

    exit_code = 9


class MissingExtraError(SplitftError):
    """A feature needs an optional package."""

    exit_code = 10


class Interrupted(SplitftError):  # noqa: N818 - it is a state, not a fault
    """The user stopped the run; everything up to the last committed round is on disk."""

    exit_code = 130
