"""The table [tokens]: how documents become rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from splitft.config_fields import CountOrZero, Section, Share


class TokensSection(Section):
    """How documents become rows of tokens, and what is held out."""

    packing: Literal["blocks", "documents"] = Field(
        "blocks", description='"blocks" joins documents and cuts them to equal length; "documents" keeps one document a row.'
    )
    block_tokens: Annotated[int, Field(ge=8, le=1_048_576)] = Field(128, description="Tokens of a row; longer documents are cut.")
    bucket_tokens: CountOrZero = Field(
        0,
        description="Clients' rows are lengthened to a multiple of so many tokens before anything of them leaves, so that sizes say less "
        "of their lengths (docs/privacy.md); a divisor of block_tokens; 0: rows travel as long as they are.",
    )
    held_out: Share = Field(0.1, description="Share of each client's documents kept from training to measure it; 0 keeps none.")
    common_held_out: Share = Field(
        0.05, description="Share of all documents kept from every client to measure the global model; 0 takes the clients' slices for it."
    )
