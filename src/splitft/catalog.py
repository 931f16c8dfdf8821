"""Everything the system can do, by name. A method is one file and one line here.

A component is a frozen dataclass: its fields are its configuration, its docstring its reference page, its class its entry.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from splitft.adapt.base import Policy
from splitft.adapt.fixed import Fixed
from splitft.aggregate.average import Average
from splitft.aggregate.base import Aggregator
from splitft.compress.base import Codec
from splitft.compress.cast import Cast
from splitft.compress.identity import Identity
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
from splitft.transport.base import Transport
from splitft.transport.inproc import InProcess

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
}
POLICIES: Mapping[str, type[Policy]] = {
    "fixed": Fixed,
}
AGGREGATORS: Mapping[str, type[Aggregator]] = {
    "average": Average,
}
TRANSPORTS: Mapping[str, type[Transport]] = {
    "inproc": InProcess,
}

# The configuration's component sections, and the transports, which the engine chooses.
CATALOG: Mapping[str, Mapping[str, type[Any]]] = {
    "data": SOURCES,
    "partition": PARTITIONS,
    "policy": POLICIES,
    "uplink": CODECS,
    "downlink": CODECS,
    "aggregator": AGGREGATORS,
    "transport": TRANSPORTS,
}


def problems(seam: str, name: str, fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with a component's name or field names, one line each; empty when it can be built."""
    table = CATALOG[seam]
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return [f"{seam}.name is {name!r}; known are {', '.join(table)}.{hint}"]
    allowed = [field.name for field in dataclasses.fields(table[name])]
    found = []
    for field in fields:
        if field not in allowed:
            near = difflib.get_close_matches(field, allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            known = ", ".join(allowed) if allowed else "none"
            found.append(f"{seam}.{field} is not a field of {name}; its fields: {known}.{hint}")
    required = [
        f.name for f in dataclasses.fields(table[name]) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    found += [f"{seam}.{field} is missing; {name} needs it" for field in required if field not in fields]
    return found


def build(seam: str, name: str, fields: Mapping[str, Any]) -> Any:
    """The component of this name with these fields. Raises ConfigError naming everything that is wrong."""
    if found := problems(seam, name, fields):
        raise ConfigError(
            f"[{seam}] has {len(found)} problem{'s' if len(found) > 1 else ''}.", "docs/configuration.md lists every field.", tuple(found)
        )
    try:
        return CATALOG[seam][name](**fields)
    except TypeError as problem:
        raise ConfigError(f"[{seam}] {name}: {problem}.", "docs/configuration.md lists every field.") from problem
