"""The journal: an append-only file of events, one JSON object a line. The only source for reports and metrics.

Numbers are written so that they read back exactly; a value that is not finite becomes null, since JSON has no other word for it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from splitft.errors import CheckpointError

NAME = "journal.jsonl"


def finite(value: Any) -> Any:
    """The same value with NaN and infinities replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def line(event: dict[str, Any]) -> str:
    """An event as JSON without line breaks. Looking for values that are not finite takes longer than writing, so it is done on demand."""
    try:
        return json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(finite(event), ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Journal:
    """Appends events to a run's journal. `bytes` is its committed length, which a checkpoint remembers."""

    def __init__(self, folder: Path, keep_bytes: int = 0) -> None:
        """Open for appending behind the first `keep_bytes`; what a crash left behind them is cut off."""
        self.path = folder / NAME
        self.path.touch()
        size = self.path.stat().st_size
        if size < keep_bytes:
            raise CheckpointError(
                f"{self.path} has {size} bytes, the checkpoint was made at {keep_bytes}.",
                "restore the journal from a copy, or start a new run.",
            )
        with self.path.open("r+b") as file:
            file.truncate(keep_bytes)
            file.flush()
            os.fsync(file.fileno())
        self.bytes = keep_bytes

    def append(self, *events: dict[str, Any]) -> None:
        """Write events and force them to the disk. Raises OSError when it refuses; then none of them is there."""
        data = "".join(line(event) + "\n" for event in events).encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                written = file.write(data)
                while written < len(data):
                    written += file.write(data[written:])
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, self.bytes)
            raise
        self.bytes += len(data)
