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
    ├── FederationError         11   client and server do not come together, for another reason than these:
    │   ├── UnreachableError    12   nobody answers at the server's address; the only one that is tried again
    │   ├── UntrustedError      13   the server's certificate is not the federation's
    │   ├── IdentityError       14   a certificate or key of this side is refused, expired or unsafe
    │   ├── RosterError         15   the federation does not list this client, or no longer
    │   ├── VersionError        16   the two sides speak different versions of the protocol
    │   ├── PolicyError         17   the server asks for what this client's policy file forbids
    │   └── ExcludedError       18   the server no longer works with this client: repeated bad messages, or another process took its place
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


class FederationError(SplitftError):
    """Client and server do not come together."""

    exit_code = 11


class UnreachableError(FederationError):
    """Nobody answers at the server's address. The only one of its kind that is worth trying again."""

    exit_code = 12


class UntrustedError(FederationError):
    """The server shows a certificate that the federation's authority did not sign for this address."""

    exit_code = 13


class IdentityError(FederationError):
    """A certificate or key of this side is missing, refused, expired, or readable by others."""

    exit_code = 14


class RosterError(FederationError):
    """The federation does not list this client, or has revoked it."""

    exit_code = 15


class VersionError(FederationError):
    """The two sides speak different versions of the protocol."""

    exit_code = 16


class PolicyError(FederationError):
    """The server asks for what this client's policy file forbids."""

    exit_code = 17


class ExcludedError(FederationError):
    """The server no longer works with this client: repeated bad messages, or another process took its place."""

    exit_code = 18


class Interrupted(SplitftError):  # noqa: N818 - it is a state, not a fault
    """The user stopped the run; everything up to the last committed round is on disk."""

    exit_code = 130
