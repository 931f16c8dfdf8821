"""Whom a run has excluded: kept in its folder, so that a restart, of the server's own or after a crash, lets nobody in again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from splitft.deploy.disk import write_atomically
from splitft.errors import CheckpointError

NAME = "excluded.json"
LIMIT_BYTES = 16 << 20


class Excluded(msgspec.Struct, frozen=True):
    """One client: its seat, after how many refused messages, and what was wrong with the last of them."""

    seat: int
    strikes: int
    why: str = ""


@dataclass
class Exclusions:
    """By name. The operator takes a name out of the file to let that client in again, and starts the server anew."""

    path: Path
    clients: dict[str, Excluded] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Exclusions:
        """Those of a run folder. Raises CheckpointError for a file that cannot be read: without it, anybody might come back."""
        path = folder / NAME
        if not path.is_file():
            return cls(path)
        try:
            if path.stat().st_size > LIMIT_BYTES:
                raise ValueError(f"longer than {LIMIT_BYTES} bytes")
            return cls(path, msgspec.json.decode(path.read_bytes(), type=dict[str, Excluded]))
        except (OSError, ValueError, msgspec.MsgspecError) as problem:
            remedy = f"mend it, or delete {path} to let in whom it names."
            raise CheckpointError(f"{path} does not say who is excluded: {problem}.", remedy) from problem

    def add(self, name: str, client: Excluded) -> None:
        """Exclude a client for good. Raises ResourceError when the disk refuses: then it lasts until the server ends."""
        self.clients[name] = client
        write_atomically(self.path, msgspec.json.format(msgspec.json.encode(self.clients), indent=1) + b"\n")
