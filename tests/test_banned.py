"""House rules that a linter does not hold: who may read time, make randomness, see the environment; sizes of files and functions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "splitft"
LONGEST_FILE_LINES, LONGEST_FUNCTION_LINES = 400, 60
# What is banned, and the one file or folder that may.
BANNED = {
    "time": "clock.py",
    "datetime.now": "clock.py",
    "datetime.today": "clock.py",
    "datetime.utcnow": "clock.py",
    "datetime.datetime.now": "clock.py",
    "datetime.datetime.today": "clock.py",
    "datetime.date.today": "clock.py",
    "date.today": "clock.py",
    "random": "rng.py",
    "secrets": "rng.py",
    "uuid": "rng.py",
    "numpy.random": "rng.py",
    "np.random": "rng.py",
    "os.urandom": "rng.py",
    "torch.manual_seed": "rng.py",
    "torch.seed": "rng.py",
    "torch.cuda.manual_seed_all": "rng.py",
    "torch.random": "rng.py",
    "os.environ": "apps/",
    "os.getenv": "apps/",
    "os.putenv": "apps/",
    "print": "apps/",
    "pickle": "",
    "marshal": "",
    "shelve": "",
    "dill": "",
    "torch.load": "",
    "torch.save": "",
    "eval": "",
    "exec": "",
    "breakpoint": "",
    "global": "",
}
# A function that is handed a generator makes no randomness; fork_rng keeps what a library draws from reaching anybody else.
HARMLESS = {"np.random.Generator", "numpy.random.Generator", "torch.random.fork_rng"}


class Names(ast.NodeVisitor):
    """Collects (line, dotted name) of every import, every whole attribute chain and every plain name that is called."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]

    def visit_Global(self, node: ast.Global) -> None:
        self.found.append((node.lineno, "global"))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            inner = inner.value
        if isinstance(inner, ast.Name):
            self.found.append((node.lineno, ast.unparse(node)))
        else:
            self.visit(inner)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name):
            self.found.append((node.lineno, node.func.id))
        self.generic_visit(node)


def faults(path: str, source: str) -> list[str]:
    """Banned names used in the file `path` (relative to the package)."""
    names = Names()
    names.visit(ast.parse(source))
    return [
        f"{path}:{line}: {name}"
        for line, name in names.found
        for banned, home in BANNED.items()
        if (name == banned or name.startswith(f"{banned}.")) and name not in HARMLESS and not (home and path.startswith(home))
    ]


def source_files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def test_nothing_banned_is_used() -> None:
    bad = [fault for file in source_files() for fault in faults(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from time import perf_counter",
        "from datetime import datetime\nnow = datetime.now()",
        "import numpy as np\nnp.random.default_rng(0)",
        "from numpy.random import default_rng",
        "import torch\ntorch.manual_seed(0)",
        "import torch\nx = [torch.load(path).weights for path in paths]",
        "import pickle",
        "import os\nhome = os.environ['HOME']",
        "print('hello')",
        "def set_it():\n    global state\n    state = 1",
        "eval('1')",
    ],
)
def test_planted_fault_is_caught(source: str) -> None:
    assert faults("engine/rounds.py", source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("clock.py", "import time\nnow = time.monotonic()"),
        ("rng.py", "import torch\ntorch.Generator().manual_seed(0)"),
        ("apps/cli.py", "print('hello')"),
        ("data/order.py", "import numpy as np\ndef draw(stream: np.random.Generator) -> None: ..."),
        ("engine/rounds.py", "model.eval()"),
        ("engine/rounds.py", "from datetime import datetime\nstart = datetime.fromisoformat(text)"),
    ],
)
def test_allowed_use_passes(path: str, source: str) -> None:
    assert not faults(path, source)


def test_files_are_short() -> None:
    lengths = {file.relative_to(ROOT).as_posix(): file.read_text("utf-8").count("\n") for file in source_files()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {
        f"{file.relative_to(ROOT)}:{node.name}": lines
        for file in source_files()
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) >= LONGEST_FUNCTION_LINES
    }
    assert long == {}


def test_files_begin_with_a_docstring_and_future_annotations() -> None:
    bad = []
    for file in source_files():
        tree = ast.parse(file.read_text("utf-8"))
        future = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
        if tree.body and not (ast.get_docstring(tree) and (future or file.name == "__init__.py")):
            bad.append(file.relative_to(ROOT).as_posix())
    assert bad == []
