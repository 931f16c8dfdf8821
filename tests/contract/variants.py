"""What the contract tests run over: every entry of the catalogue, once with its defaults and once for each set of fields below."""

from __future__ import annotations

from typing import Any

from splitft.catalog import AGGREGATORS, CODECS, POLICIES, SYNCHRONISATIONS

# Fields worth a contract run of their own. A new method is tested with its defaults without a line here.
CODEC_FIELDS: dict[str, list[dict[str, Any]]] = {
    "cast": [{"dtype": "float16"}, {"dtype": "float32"}],
    "quantize": [
        {"bits": 4, "rounding": "stochastic"},
        {"bits": 2, "symmetric": False, "outliers": 0.1},
        {"per": "channel", "symmetric": False},
        {"bits": 4, "per": "block", "block": 5, "outliers": 0.03},
        {"bits": 2, "per": "channel", "rounding": "stochastic"},
    ],
    "error_bounded": [
        {"of": "range", "per": "token", "bound": 0.01},
        {"of": "absolute", "bound": 0.5, "rounding": "stochastic"},
        {"per": "channel", "dead_zone": 0.7, "bound": 1.0},
    ],
    "topk": [{"share": 0.3, "random": 0.4}, {"share": 1.0}],
    "randk": [{"share": 0.4, "unbiased": False}],
    "residual": [
        {"cache_mb": 0.0003, "evict": "oldest"},
        {"ignore": 0.1, "drift": False},
        {"inner": "cast", "cache_dtype": "float32", "cache_mb": 0.0003, "spill": True},
    ],
    "temporal": [
        {"cache_mb": 0.0003, "evict": "oldest", "dimensions": 3},
        {"threshold": 0.5, "cache_dtype": "float16", "cache_mb": 0.0002},
    ],
    "lowrank": [{"rank": 2, "bits": 8, "cache_mb": 0.0003, "evict": "oldest"}, {"energy": 0.9, "cache_dtype": "float16"}],
    "projection": [{"basis": "random"}, {"dimensions": 3, "inner": "cast"}],
    "feedback": [{"decay": 0.5, "cache_mb": 0.0003, "cache_dtype": "bfloat16"}],
    "entropy": [{"level": 3, "item_bytes": 3}],
    "noise": [{"clip": 2.0, "multiple": 0.5}, {"clip": 1.0, "inner": {"name": "quantize", "rounding": "stochastic"}}],
}
# Codecs over codecs, up to four deep, beside those that the tables give by themselves (see `_composed`).
CODEC_TOWERS: list[tuple[str, dict[str, Any]]] = [
    ("projection", {"inner": {"name": "residual", "inner": {"name": "error_bounded", "bound": 0.2, "of": "absolute"}}}),
    ("temporal", {"inner": {"name": "entropy", "inner": "cast"}}),
    ("temporal", {"inner": {"name": "lowrank", "rank": 2, "bits": 8, "cache_mb": 0.0002}, "cache_mb": 0.0003}),
    ("feedback", {"inner": {"name": "topk", "share": 0.3, "inner": {"name": "quantize", "bits": 4}}}),
    ("topk", {"share": 0.3, "inner": {"name": "entropy", "inner": "cast"}}),
    ("lowrank", {"rank": 3, "inner": {"name": "entropy", "inner": {"name": "quantize", "rounding": "stochastic"}}}),
    ("entropy", {"inner": {"name": "temporal", "inner": {"name": "residual", "inner": "quantize"}}}),
    ("feedback", {"inner": {"name": "residual", "inner": {"name": "topk", "share": 0.5, "inner": {"name": "entropy"}}}}),
]
# Codecs that another one takes only with fields that are not their defaults.
INSIDE: dict[tuple[str, str], dict[str, Any]] = {("feedback", "randk"): {"name": "randk", "unbiased": False}}
POLICY_FIELDS: dict[str, list[dict[str, Any]]] = {
    "fixed": [{"cuts": [2]}, {"cuts": [1, 6, 3, 2, 5]}],
    "resource": [{"prefer": "shallowest", "slack": 0.5, "tolerance": 0.0}],
    "search": [{"evaluations": 1}, {"smoothing": 0.0}],
    "splitft": [{"start": 3, "gamma": 2.0, "cool_down": 0}],
    "combined": [{"slack": 2.0, "gamma": 2.0, "cool_down": 0, "every_rounds": 1}],
}
# What a policy needs of a run besides its own fields.
POLICY_COSTS: dict[str, dict[str, Any]] = {"whole": {"exit_on_client": True}}
AGGREGATOR_FIELDS: dict[str, list[dict[str, Any]]] = {
    "product": [{"partitioned": True}],
    "zero_pad": [{"weights": "norm"}],
    "fed_avgm": [{"rule": "norm_clip", "momentum": 0.0}, {"rule": {"name": "segments", "count": 3}}, {"rule": "product"}],
    "fed_adam": [{"rule": {"name": "fed_avgm", "rule": "median"}}],
    "fed_yogi": [{"rule": "freeze_a"}, {"rule": {"name": "private", "secret_seed": 1}}],
    "median": [{"rule": {"name": "segments", "count": 4}}, {"rule": "product"}, {"rule": "stack"}],
    "trimmed_mean": [{"share": 0.0}, {"share": 0.4, "rule": "norm_clip"}, {"rule": "freeze_a"}],
    "norm_clip": [{"limit": 1000.0}, {"rule": "stack"}, {"rule": {"name": "product", "partitioned": True}}, {"rule": "zero_pad"}],
    "krum": [{"attackers": 0, "keep": 2}, {"keep": 3, "rule": "trimmed_mean"}, {"rule": "residual"}],
    "segments": [
        {"count": 1},
        {"count": 5, "rule": {"name": "fed_avgm", "rule": "norm_clip"}},
        {"rule": {"name": "median", "rule": "stack"}},
    ],
    "private": [
        {"noise_multiplier": 0.0, "clip": 1e6, "rate": 0.0},
        {"noise_multiplier": 0.0, "clip": 1e6, "rate": 0.0, "rule": "average"},
        {"epsilon": 3.0, "rounds": 9, "rule": "average", "unit": "absent", "secret_seed": 5},
    ],
}
SYNCHRONISATION_FIELDS: dict[str, list[dict[str, Any]]] = {"drift": [{"exact": True}, {"max_rounds": 3, "rows": 1, "width": 7, "seed": 5}]}

# Laws that are not true of an aggregation rule, nor of a rule over it: token counts do not weigh; the first step has its own length.
UNWEIGHTED = {"median", "trimmed_mean", "krum", "private"}
OWN_STEP = {"fed_adam", "fed_yogi"}


def noisy(rule: Any) -> bool:
    """Whether a rule, or one inside it, adds noise or holds clients to a fixed length: then nothing is taken over as it is."""
    return getattr(rule, "noise_multiplier", 0.0) > 0 or (hasattr(rule, "rule") and noisy(rule.rule))


def names_inside(rule: Any) -> set[str]:
    """Catalogue names of a rule and of the rules inside it."""
    own = {name for name, kind in AGGREGATORS.items() if type(rule) is kind}
    return own | names_inside(rule.rule) if hasattr(rule, "rule") else own


# The error these codecs declare in their docstrings, for values in the normal range of their type: (relative, absolute below it).
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
        return self.name + "".join(f"-{_plain(value)}" for value in self.fields.values()).replace(" ", "")

    def build(self) -> Any:
        from splitft.catalog import build

        return build(self.seam, self.name, self.fields)


def _plain(value: Any) -> str:
    """A field's value, a component in it as its variant."""
    if not isinstance(value, dict) or "name" not in value:
        return str(value)
    return f"({Variant('', value['name'], {key: one for key, one in value.items() if key != 'name'})!r})"


def _composed() -> list[Variant]:
    """Every codec inside each wrapper of the catalogue that takes it and is named here; a new codec is among them by its name alone."""
    found = [Variant("uplink", name, fields) for name, fields in CODEC_TOWERS]
    for inner in CODECS:
        one = Variant("uplink", inner, {}).build()
        outers = ("entropy", "residual", "feedback", "lowrank") if one.mirrored and not one.outermost else ("entropy",)
        found += [Variant("uplink", outer, {"inner": INSIDE.get((outer, inner), inner)}) for outer in outers]
    return found


def _variants(seam: str, table: Any, fields: dict[str, list[dict[str, Any]]]) -> list[Variant]:
    return [Variant(seam, name, chosen) for name in table for chosen in ({}, *fields.get(name, []))]


CODEC_VARIANTS = _variants("uplink", CODECS, CODEC_FIELDS)
ALL_CODEC_VARIANTS = CODEC_VARIANTS + _composed()
POLICY_VARIANTS = _variants("policy", POLICIES, POLICY_FIELDS)
AGGREGATOR_VARIANTS = _variants("aggregator", AGGREGATORS, AGGREGATOR_FIELDS)
SYNCHRONISATION_VARIANTS = _variants("synchronisation", SYNCHRONISATIONS, SYNCHRONISATION_FIELDS)
