"""No code comes out of data: nothing in the sources could run it, and nothing does during a whole federation."""

from __future__ import annotations

import ast
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import splitft

from .federation_scenes import scene
from .process_scenes import Ground
from .security_runs import COMMON, merged

pytestmark = pytest.mark.timeout(60)
SOURCES = Path(splitft.__file__).parent
# Names that turn data into code, and the one file that may use them, with why.
BANNED = {
    "pickle": "",
    "dill": "",
    "cloudpickle": "",
    "marshal": "",
    "shelve": "",
    "torch.load": "",
    "yaml": "",
    "eval": "",
    "exec": "",
    "__import__": "",
    "os.system": "",
    "os.popen": "",
    "subprocess": "selfcheck or doctor",
    "ctypes": "",
    "joblib": "",
}


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Imports, attribute chains and calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, str(node.module)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.lineno, node.func.id


def code_from_data(source: str) -> list[tuple[int, str]]:
    tree = ast.parse(source)
    found = [(line, name) for line, name in names_in(tree) if any(name == one or name.startswith(f"{one}.") for one in BANNED)]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell", "allow_pickle", "weights_only"):
            allowed = node.arg == "weights_only"
            if isinstance(node.value, ast.Constant) and bool(node.value.value) is not allowed:
                found.append((node.lineno, f"{node.arg}={node.value.value}"))
    return found


def test_nothing_in_the_sources_makes_code_of_data() -> None:
    found = {path.relative_to(SOURCES): code_from_data(path.read_text()) for path in SOURCES.rglob("*.py")}
    assert len(found) > 200
    wrong = {str(path): uses for path, uses in found.items() if uses}
    # A command that compares configurations starts this interpreter again; the console asks the C library to give memory back.
    assert {path: {name.split(".")[0].split("(")[0] for _, name in uses} for path, uses in wrong.items()} == KNOWN


KNOWN: dict[str, set[str]] = {
    "apps/compare_pool.py": {"subprocess"},
    "apps/console.py": {"ctypes"},
}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "x = torch.load(p)",
        "eval(a)",
        "f(trust_remote_code=True)",
        "import yaml",
        "numpy.load(p, allow_pickle=True)",
    ],
)
def test_the_test_above_can_fail(source: str) -> None:
    assert code_from_data(source)


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What unpickles, compiles or starts a process while the block runs: the names of the audit's events."""
    seen, armed = list[str](), [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if armed[0] and event in ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "ctypes.dlopen"):
            seen.append(f"{event} {str(arguments)[:200]}")

    def refuse(*arguments: Any, **named: Any) -> Any:
        seen.append("an unpickler was made")
        raise AssertionError("an unpickler was made")

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    sys.addaudithook(hook)
    try:
        yield seen
    finally:
        armed[0] = False


def test_a_whole_federation_without_a_pickle(tmp_path: Path, ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.copy_to(tmp_path)
    with (
        watched(monkeypatch) as seen,
        scene(tmp_path, 2, **merged(COMMON, {"rounds": 2, "policy": {"name": "fixed", "cuts": [1, 2]}})) as fed,
    ):
        fed.all_clients()
        fed.end()
    assert seen == []


def test_the_watch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(Path("x"))
    with watched(monkeypatch) as seen:
        with pytest.raises(AssertionError):
            pickle.loads(data)
        monkeypatch.undo()
        pickle.loads(data)
    assert len(seen) >= 2
