"""How often a server has opened each round for a client: each time shows it more of the text, and with noise one sample more to average."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from splitft.compress.noise import noise_in
from splitft.deploy.disk import private_folder, read_private, write_private
from splitft.engine.settings import TrainSettings
from splitft.errors import IdentityError, PolicyError, ResourceError, SplitftError

FILE = "openings.json"
# A server may open a round again after a fault, and not without end.
MOST_OPENINGS = 100
# Where what leaves has noise, a round that is not the same to the last bit gets fresh noise, and so many samples average it out.
MOST_NOISY = 3
LIMIT_BYTES = 16 << 20


class Openings:
    """The openings of a client's rounds in one run, by purpose. With noise they are kept in `folder`: a client that is started again still
    knows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counted: Counter[str] = Counter()

    def count(self, round_index: int, purpose: str, settings: TrainSettings, refused: Callable[[SplitftError], None]) -> None:
        """One opening more, before anything of the round leaves. `refused` is called as long as the disk does not take the count. Raises
        PolicyError for one too many."""
        noisy = any(noise_in(codec) is not None for codec in (*settings.codecs, settings.adapter_uplink))
        name, path, most = f"{round_index} {purpose}", self.folder / FILE, MOST_NOISY if noisy else MOST_OPENINGS
        counted = _read(path) if noisy else self.counted
        counted = counted + Counter({name: 1})
        if counted[name] > most:
            raise PolicyError(
                f"the server has opened round {round_index} more than {most} times"
                + (", and noise on what leaves averages out." if noisy else "."),
                "talk to its operator" + (f"; after a fault that you know of, remove {path}." if noisy else "."),
            )
        while noisy:
            try:
                private_folder(self.folder)
                write_private(path, json.dumps(counted).encode())
                break
            except ResourceError as problem:
                refused(problem)
        self.counted = counted


def _read(path: Path) -> Counter[str]:
    """The openings in a file; none when it is not there. Raises PolicyError for one that holds something else."""
    if not path.exists():
        return Counter()
    try:
        found = json.loads(read_private(path, LIMIT_BYTES, "the count of opened rounds"))
        return Counter({str(name): int(count) for name, count in found.items()})
    except (IdentityError, ValueError, TypeError, AttributeError) as problem:
        raise PolicyError(
            f"{path} does not say how often rounds were opened: {problem}.", "if nobody has changed it, remove it."
        ) from problem
