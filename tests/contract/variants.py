"""What the contract tests run over: every entry of the catalogue, once with its defaults and once for each set of fields below."""

from __future__ import annotations

from typing import Any

from splitft.catalog import AGGREGATORS, CODECS, POLICIES

# Fields worth a contract run of their own. A new method is tested with its defaults without a line here.
CODEC_FIELDS: dict[str, list[dict[str, Any]]] = {
    "cast": [{"dtype": "float16"}, {"dtype": "float32"}],
}
POLICY_FIELDS: dict[str, list[dict[str, Any]]] = {"fixed": [{"cuts": [2]}, {"cuts": [1, 6, 3, 2, 5]}]}
AGGREGATOR_FIELDS: dict[str, list[dict[str, Any]]] = {}

# The error each codec declares in its docstring, for values in the normal range of its type: (relative, absolute below it).
ERROR_BOUNDS: dict[tuple[str, str], tuple[float, float]] = {
    ("identity", ""): (0.0, 0.0),
    ("cast", ""): (2.0**-8, 2.0**-134),
    ("cast", "float16"): (2.0**-11, 2.0**-25),
    ("cast", "float32"): (0.0, 0.0),
}


class Variant:
    """A catalogue entry with fields; its test id is readable."""

    def __init__(self, seam: str, name: str, fields: dict[str, Any]) -> None:
        self.seam, self.name, self.fields = seam, name, fields

    def __repr__(self) -> str:
        return self.name + "".join(f"-{value}" for value in self.fields.values()).replace(" ", "")

    def build(self) -> Any:
        from splitft.catalog import build

        return build(self.seam, self.name, self.fields)


def _variants(seam: str, table: Any, fields: dict[str, list[dict[str, Any]]]) -> list[Variant]:
    return [Variant(seam, name, chosen) for name in table for chosen in ({}, *fields.get(name, []))]


CODEC_VARIANTS = _variants("uplink", CODECS, CODEC_FIELDS)
POLICY_VARIANTS = _variants("policy", POLICIES, POLICY_FIELDS)
AGGREGATOR_VARIANTS = _variants("aggregator", AGGREGATORS, AGGREGATOR_FIELDS)
