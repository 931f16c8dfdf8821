"""The table [secure_aggregation]: whether the clients' own adapters are summed behind masks."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from splitft.config_fields import Section


class SecureAggregationSection(Section):
    """Clients' own adapters are sent as a sum only, which hides nothing that activations, labels and gradients tell (privacy.md)."""

    enabled: bool = Field(
        False,
        description="Sum the clients' own adapters behind masks (Bonawitz et al. 2017, doi 10.1145/3133956.3133982); linear rules only.",
    )
    threshold: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = Field(
        0.0,
        description="Share of a round's clients that must stay to open their sum, above 0.5; 0: just over two thirds, which withstands a "
        "server that has just under a third of them on its side.",
    )
    minimum: Annotated[int, Field(ge=3, le=1000)] = Field(
        3, description="Fewest clients among which an adapter is hidden; deeper cuts than so many share are taken back."
    )
    limit: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        64, description="Largest value of an adapter that can be summed; a smaller one makes the fixed point's step finer."
    )
