"""The table [federation]: how a server on a real network meets its clients."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from splitft.config_fields import Count, NotNegative, Section


class FederationSection(Section):
    """How a server meets its clients (`splitft server`); a simulation does not look at it. Times are seconds of a real clock."""

    address: str = Field(
        "127.0.0.1:7443", min_length=3, description="Host and port the server listens on; 0.0.0.0:7443 for all interfaces."
    )
    identity: str = Field(
        "federation", min_length=1, description="Folder of the federation's authority, roster and server certificate (splitft enroll init)."
    )
    enroll_address: str = Field(
        "", description='Where invited clients fetch their certificate: empty takes the port after address, "off" enrols nobody.'
    )
    status_address: str = Field(
        "127.0.0.1:7480", description='Status page, /metrics and /health: loopback, or over TLS with client certificates; "off": none.'
    )
    gather_s: Annotated[float, Field(ge=0.0, le=10.0, allow_inf_nan=False)] = Field(
        0.005, description="How long a server pass waits for more clients once one waits; none with engine.deterministic."
    )
    join_s: NotNegative = Field(10.0, description="How long a round's start waits for more clients once clients.minimum are there.")
    heartbeat_s: Annotated[float, Field(ge=0.01, le=600.0, allow_inf_nan=False)] = Field(
        10.0, description="Seconds between signs of life of an idle connection."
    )
    liveness_s: Annotated[float, Field(ge=0.05, le=86_400.0, allow_inf_nan=False)] = Field(
        32.0, description="Silence after which a connection counts as broken; moving bytes are signs of life."
    )
    absence_s: Annotated[float, Field(ge=0.1, allow_inf_nan=False)] = Field(
        600.0, description="How long a round waits for a participant that is gone; then it is lost, if the quorum is there without it."
    )
    grace_s: NotNegative = Field(10.0, description="How long a stop, or a late client that was asked to finish, is waited for.")
    strikes: Count = Field(3, description="Refused messages after which a client is excluded, until it is taken out of excluded.json.")
    update_norm_factor: NotNegative = Field(
        100.0, description="An update this many times as large as the median of the accepted ones is refused; 0 accepts any finite one."
    )
    held_out: str = Field(
        "", description="Public text file (.txt or .jsonl) on the server to measure the joined model on; empty: the clients' own."
    )
    max_clients: Annotated[int, Field(ge=1, le=100_000)] = Field(1000, description="Most connections at a time.")
    buffer_mb: Count = Field(1024, description="Most memory, in megabytes, that unfinished and waiting messages of all clients may take.")
    share_adapter: bool = Field(True, description="Clients may fetch the joined adapter at the end of the run.")
