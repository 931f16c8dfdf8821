"""Imports point down: words, core, algorithms, engine and transport, apps. The table below is the architecture."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "splitft"
WORDS = {
    "types",
    "messages",
    "config",
    "config_bottleneck",
    "config_checks",
    "config_fields",
    "config_federation",
    "config_secure",
    "config_tokens",
    "config_values",
    "waits",
    "toml",
    "errors",
    "keyed",
    "clock",
    "links",
    "lockstep",
    "rng",
}
SEAM_BASES = {
    f"{seam}.base" for seam in ("models", "compress", "control", "aggregate", "adapt", "ranks", "sync", "work", "transport", "data")
}
MAY_IMPORT = dict.fromkeys(WORDS, WORDS) | {
    "models": WORDS,
    "privacy": WORDS,  # arithmetic of promises and secret noise: plain numbers
    "compress": WORDS | {"privacy"},
    "control": WORDS,
    "data": WORDS,
    "products": WORDS,
    "bottleneck": WORDS,
    "lora": WORDS | {"models.base", "products", "bottleneck"},
    "loss": WORDS | {"models.base", "products"},
    "optimizer": WORDS | {"lora"},
    "wire": WORDS | {"compress.base"},
    "split": WORDS | {"models", "lora", "products"},
    "peft_format": WORDS | {"lora", "models.base"},
    "selfcheck": WORDS | {"models", "split", "lora"},
    "lowrank": WORDS | {"lora"},
    "aggregate": WORDS | {"lora", "lowrank", "privacy"},
    "adapt": WORDS | {"compress.base"},
    "ranks": WORDS | {"lora", "lowrank", "adapt.cost"},
    "sync": WORDS,
    "work": WORDS,
    "secure": WORDS,
    "transport": WORDS,  # it is handed a handler and never sees the engine
    # Cost, schedule, fleets, oscillation and batch order are shared arithmetic, not methods to choose from.
    "engine": WORDS
    | SEAM_BASES
    | {
        "adapt.cost",
        "adapt.schedule",
        "adapt.fleets",
        "adapt.oscillation",
        "data.order",
        "split",
        "bottleneck",
        "lora",
        "lowrank",
        "loss",
        "optimizer",
        "secure",
        "wire",
    },
}
# A real federation: the engine's two ends over a network. It is handed built components and knows no catalogue and no command line.
MAY_IMPORT["deploy"] = set(MAY_IMPORT) | {"__version__"}
# The leakage audit: it is handed a built run and attacks it, and knows no catalogue and no command line.
MAY_IMPORT["audit"] = set(MAY_IMPORT)
MAY_IMPORT_ANYTHING = {"apps", "catalog", "__init__", "__main__"}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of splitft that `tree` imports, without the leading `splitft.`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "splitft":
            path = (node.module or "").split(".")[1:]
            yield from [".".join(path)] if len(path) > 1 else [".".join([*path, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("splitft.") for alias in node.names if alias.name.startswith("splitft."))


def violations(unit: str, source: str) -> list[str]:
    """What a file of `unit` imports and may not."""
    allowed = MAY_IMPORT[unit] | {unit}
    return [name for name in imported(ast.parse(source)) if not {name, name.split(".")[0], ".".join(name.split(".")[:2])} & allowed]


def unit_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def source_files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def test_every_unit_has_a_layer() -> None:
    units = {unit_of(file) for file in source_files()}
    assert units - set(MAY_IMPORT) - MAY_IMPORT_ANYTHING == set()


def test_imports_point_down() -> None:
    bad = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in source_files()
        if unit_of(file) in MAY_IMPORT
        for name in violations(unit_of(file), file.read_text("utf-8"))
    ]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("types", "from splitft.lora import AdapterBank"),
        ("transport", "from splitft.engine.server import Server"),
        ("engine", "from splitft.compress.cast import Cast"),
        ("engine", "def late():\n    from splitft.catalog import CATALOG"),
        ("data", "import splitft.engine.rounds"),
        ("compress", "from splitft import split"),
        ("aggregate", "from splitft.adapt import base"),
        ("engine", "from splitft.data.partitions.iid import Iid"),
    ],
)
def test_planted_violation_is_caught(unit: str, source: str) -> None:
    assert violations(unit, source)


@pytest.mark.parametrize(
    ("unit", "source"),
    [
        ("engine", "from splitft.compress.base import Codec"),
        ("engine", "from splitft.adapt import base"),
        ("data", "from splitft import rng"),
        ("data", "from splitft.data.partitions.draw import owner_names"),
    ],
)
def test_allowed_import_passes(unit: str, source: str) -> None:
    assert not violations(unit, source)


def run_time_imports(file: Path) -> set[str]:
    """Modules `file` imports when it is imported itself: not inside functions, not under TYPE_CHECKING."""
    kept: list[ast.stmt] = [
        node
        for node in ast.parse(file.read_text("utf-8")).body
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        and isinstance(node, ast.Import | ast.ImportFrom | ast.If)
    ]
    return set(imported(ast.Module(kept, [])))


def test_no_file_imports_itself_in_a_circle() -> None:
    graph = {".".join(file.relative_to(ROOT).with_suffix("").parts): run_time_imports(file) for file in source_files()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for inner in sorted(graph.get(name, ())):
                visit(inner, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
