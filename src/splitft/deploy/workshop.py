"""What a client needs made for it: its data, its part of the model, its policy. The command line makes it of what is configured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from splitft.deploy.letters import Finished, Ready, Welcome
from splitft.deploy.sealing import Insider
from splitft.engine.settings import Federation
from splitft.messages import RoundStart, ScoreStart

FetchBytes = Callable[[str, int], bytes]


class Workshop(Protocol):
    """What the federation's configuration and the client's own data and machine make of a client."""

    def settle(self, welcome: Welcome, fetch: FetchBytes) -> Ready:
        """Check the welcome against the policy, tokenise the data; raises PolicyError, DataError, ModelError, ResourceError."""

    def federation(self, seat: int, cut: int, tail_blocks: int, exit_on_client: bool, fetch: FetchBytes) -> Federation:
        """The client's part of the model in slots, its weights fetched if need be."""

    def limit_bytes(self) -> int:
        """The largest message that the server has reason to send."""

    def check_round(self, start: RoundStart) -> None: ...

    def check_score(self, start: ScoreStart) -> None: ...

    def insider(self, seat: int) -> Insider | None:
        """The client's standing in secure aggregation; None where the run has none."""

    def check_gradient(self, gradient: Tensor) -> None: ...

    def check_adapters(self, vector: Tensor) -> None: ...

    def keep_adapter(self, finished: Finished, fetch: FetchBytes) -> Path | None:
        """Fetch the joined adapter, if the server shares it."""
