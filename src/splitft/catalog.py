"""Everything the system can do, by name. A method is one file and one line here.

A component is a frozen dataclass: its fields are its configuration, its docstring its reference page, its class its entry.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from splitft.adapt.base import Policy
from splitft.adapt.combined import Combined
from splitft.adapt.fixed import Fixed
from splitft.adapt.resource import Resource
from splitft.adapt.search import Search
from splitft.adapt.splitft import SplitFT
from splitft.adapt.whole import Whole
from splitft.aggregate.average import Average
from splitft.aggregate.base import Aggregator
from splitft.aggregate.fed_adam import FedAdam
from splitft.aggregate.fed_avgm import FedAvgM
from splitft.aggregate.fed_yogi import FedYogi
from splitft.aggregate.freeze_a import FreezeA
from splitft.aggregate.krum import Krum
from splitft.aggregate.median import Median
from splitft.aggregate.norm_clip import NormClip
from splitft.aggregate.private import Private
from splitft.aggregate.product import Product
from splitft.aggregate.residual import Residual
from splitft.aggregate.segments import Segments
from splitft.aggregate.stack import Stack
from splitft.aggregate.trimmed_mean import TrimmedMean
from splitft.aggregate.zero_pad import ZeroPad
from splitft.compress.base import Codec
from splitft.compress.cast import Cast
from splitft.compress.entropy import Entropy
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.feedback import Feedback
from splitft.compress.identity import Identity
from splitft.compress.lowrank import LowRank
from splitft.compress.noise import Noise
from splitft.compress.projection import Projection
from splitft.compress.quantize import Quantize
from splitft.compress.randk import RandK
from splitft.compress.residual import Residual as ResidualChange
from splitft.compress.same import Same
from splitft.compress.temporal import Temporal
from splitft.compress.topk import TopK
from splitft.control.bang_bang import BangBang
from splitft.control.base import Controller
from splitft.control.ddpg import Ddpg
from splitft.control.energy import Energy
from splitft.control.fixed import FixedDial
from splitft.data.base import Partition, Source
from splitft.data.folder import ClientFolder
from splitft.data.hub import HubDataset
from splitft.data.jsonl import JsonLines
from splitft.data.partitions.by_column import ByColumn
from splitft.data.partitions.dirichlet import Dirichlet
from splitft.data.partitions.files import Files
from splitft.data.partitions.iid import Iid
from splitft.data.partitions.length_dirichlet import LengthDirichlet
from splitft.data.python_docs import PythonDocs
from splitft.data.text import TextFiles
from splitft.errors import ConfigError
from splitft.ranks.base import RankPolicy
from splitft.ranks.budget import BudgetRanks
from splitft.ranks.importance import ImportanceRanks
from splitft.ranks.splitft import CutRank
from splitft.ranks.uniform import Uniform
from splitft.sync.base import Synchronisation
from splitft.sync.drift import Drift
from splitft.sync.every_round import EveryRound
from splitft.transport.base import Transport
from splitft.transport.inproc import InProcess
from splitft.work.balanced import Balanced
from splitft.work.base import WorkPolicy
from splitft.work.equal import Equal

SOURCES: Mapping[str, type[Source]] = {
    "python_docs": PythonDocs,
    "text": TextFiles,
    "jsonl": JsonLines,
    "folder": ClientFolder,
    "hub": HubDataset,
}
PARTITIONS: Mapping[str, type[Partition]] = {
    "iid": Iid,
    "dirichlet": Dirichlet,
    "length_dirichlet": LengthDirichlet,
    "by_column": ByColumn,
    "files": Files,
}
CODECS: Mapping[str, type[Codec]] = {
    "identity": Identity,
    "cast": Cast,
    "quantize": Quantize,
    "error_bounded": ErrorBounded,
    "topk": TopK,
    "randk": RandK,
    "residual": ResidualChange,
    "temporal": Temporal,
    "lowrank": LowRank,
    "projection": Projection,
    "feedback": Feedback,
    "entropy": Entropy,
    "noise": Noise,
}
CONTROLLERS: Mapping[str, type[Controller]] = {
    "fixed": FixedDial,
    "bang_bang": BangBang,
    "energy": Energy,
    "ddpg": Ddpg,
}
POLICIES: Mapping[str, type[Policy]] = {
    "fixed": Fixed,
    "resource": Resource,
    "search": Search,
    "splitft": SplitFT,
    "combined": Combined,
    "whole": Whole,
}
RANK_POLICIES: Mapping[str, type[RankPolicy]] = {
    "uniform": Uniform,
    "splitft": CutRank,
    "budget": BudgetRanks,
    "importance": ImportanceRanks,
}
WORK_POLICIES: Mapping[str, type[WorkPolicy]] = {
    "equal": Equal,
    "balanced": Balanced,
}
SYNCHRONISATIONS: Mapping[str, type[Synchronisation]] = {
    "every_round": EveryRound,
    "drift": Drift,
}
AGGREGATORS: Mapping[str, type[Aggregator]] = {
    "average": Average,
    "product": Product,
    "stack": Stack,
    "residual": Residual,
    "freeze_a": FreezeA,
    "zero_pad": ZeroPad,
    "fed_avgm": FedAvgM,
    "fed_adam": FedAdam,
    "fed_yogi": FedYogi,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "norm_clip": NormClip,
    "krum": Krum,
    "segments": Segments,
    "private": Private,
}
TRANSPORTS: Mapping[str, type[Transport]] = {
    "inproc": InProcess,
}

# The configuration's component sections, and the transports, which the engine chooses.
CATALOG: Mapping[str, Mapping[str, type[Any]]] = {
    "data": SOURCES,
    "partition": PARTITIONS,
    "policy": POLICIES,
    "ranks": RANK_POLICIES,
    "work": WORK_POLICIES,
    "synchronisation": SYNCHRONISATIONS,
    "uplink": CODECS,
    "downlink": CODECS,
    "exit_downlink": {"same": Same, **CODECS},
    "exit_uplink": {"same": Same, **CODECS},
    "adapter_uplink": CODECS,
    "adapter_downlink": {"same": Same, **CODECS},
    "controller": CONTROLLERS,
    "aggregator": AGGREGATORS,
    "transport": TRANSPORTS,
}


# A method that works over another one of its seam holds it in this field: `rule = "average"`, or a table with a name.
INNER: Mapping[str, str] = {
    "aggregator": "rule",
    "uplink": "inner",
    "downlink": "inner",
    "exit_uplink": "inner",
    "exit_downlink": "inner",
    "adapter_uplink": "inner",
    "adapter_downlink": "inner",
}


def problems(seam: str, name: str, fields: Mapping[str, Any], path: str = "") -> list[str]:
    """What is wrong with a component's name or field names, one line each; empty when it can be built. `path`: where it stands, if inside
    another one of its seam."""
    table, path = CATALOG[seam], path or seam
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return [f"{path}.name is {name!r}; known are {', '.join(table)}.{hint}"]
    allowed = [field.name for field in dataclasses.fields(table[name])]
    found = []
    for field in fields:
        if field not in allowed:
            near = difflib.get_close_matches(field, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            known = ", ".join(allowed) if allowed else "none"
            found.append(f"{path}.{field} is not a field of {name}; its fields: {known}.{hint}")
        elif field == INNER.get(seam):
            inner = _inner(seam, table[name], fields[field])
            wrong = f"{path}.{field} is {fields[field]!r}; allowed is a name or a table with a name."
            found += problems(seam, *inner, f"{path}.{field}") if inner else [wrong]
    required = [
        f.name for f in dataclasses.fields(table[name]) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    found += [f"{path}.{field} is missing; {name} needs it" for field in required if field not in fields]
    return found


def _inner(seam: str, outer: type[Any], value: object) -> tuple[str, dict[str, Any]] | None:
    """Name and fields of a component inside another one; None when it is no component. A table without a name changes fields of the one
    that the outer component has by default."""
    if isinstance(value, str):
        return value, {}
    if not isinstance(value, Mapping) or not isinstance(value.get("name", ""), str):
        return None
    table = dict(value) if "name" in value else _merged(described(seam, _default(outer, INNER[seam])), value)
    return str(table.pop("name")), table


def _default(outer: type[Any], field: str) -> Any:
    """The component that a field has by default."""
    one = next(one for one in dataclasses.fields(outer) if one.name == field)
    return one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default


def described(seam: str, component: Any) -> dict[str, Any]:
    """A component as the table that builds it."""
    name = next(name for name, kind in CATALOG[seam].items() if kind is type(component))
    values = {field.name: getattr(component, field.name) for field in dataclasses.fields(component)}
    place = INNER.get(seam, "")
    return {"name": name, **{key: described(seam, value) if key == place else value for key, value in values.items()}}


def _merged(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A table with changes in it; inner tables are merged unless another component is named."""
    merged = dict(table)
    for key, value in changes.items():
        known = merged.get(key)
        merged[key] = _merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) and "name" not in value else value
    return merged


def build(seam: str, name: str, fields: Mapping[str, Any]) -> Any:
    """The component of this name with these fields. Raises ConfigError naming everything that is wrong."""
    if found := problems(seam, name, fields):
        raise ConfigError(
            f"[{seam}] has {len(found)} problem{'s' if len(found) > 1 else ''}.", "docs/configuration.md lists every field.", tuple(found)
        )
    place = INNER.get(seam, "")
    inner = _inner(seam, CATALOG[seam][name], fields[place]) if place in fields else None
    given = {**fields, place: build(seam, *inner)} if inner else fields
    try:
        return CATALOG[seam][name](**given)
    except TypeError as problem:
        raise ConfigError(f"[{seam}] {name}: {problem}.", "docs/configuration.md lists every field.") from problem
