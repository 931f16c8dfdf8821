"""What the README and the pages of docs/ say can be done can be done: commands, configurations, links, names, the file map."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import splitft
from splitft.apps import cli
from splitft.apps.assemble import build_components
from splitft.config import RunConfig, load_config
from splitft.deploy.policy import ClientPolicy, load_policy
from splitft.errors import ConfigError

from ..support import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
FOLDERS = (".", "docs", "docs/decisions", "examples/01_simulate", "examples/03_federation")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> Iterator[tuple[Path, str]]:
    """Every fenced block in this language, with its page."""
    for page in PAGES:
        for found, text in BLOCK.findall(page.read_text("utf-8")):
            if found == language:
                yield page, text


def commands() -> list[tuple[Path, list[str]]]:
    """Every line of a shell block as words, comments left out."""
    lines = [(page, shlex.split(line, comments=True)) for page, text in blocks("sh") for line in text.splitlines()]
    return [(page, words) for page, words in lines if words]


def splitft_commands() -> list[tuple[Path, list[str]]]:
    return [(page, words[1:]) for page, words in commands() if words[0] == "splitft"]


def named(item: tuple[Path, list[str]]) -> str:
    return f"{item[0].name}: {' '.join(item[1])}"


def file_map(readme: str) -> list[str]:
    section = readme.split("## Where things are")[1].split("\n## ")[0]
    return [line.split()[0] for line in BLOCK.findall(section)[0][1].splitlines()]


def test_the_file_map_names_every_source_file_and_nothing_else() -> None:
    package = ROOT / "src" / "splitft"
    files = [file for file in package.rglob("*.py") if file.name != "__init__.py" or file.parent == package]
    named_files = file_map(README)
    assert len(named_files) == len(set(named_files))
    assert set(named_files) == {file.relative_to(package).as_posix() for file in files}


def test_every_line_of_the_file_map_says_something() -> None:
    section = README.split("## Where things are")[1]
    assert all(len(line.split(maxsplit=1)) == 2 and len(line) <= 110 for line in BLOCK.findall(section)[0][1].splitlines())


def test_the_number_of_model_layouts_is_that_of_the_test() -> None:
    assert f"{len(FAMILIES)} model layouts" in README


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What a command would start, instead of starting it; the working folder has what the pages tell the reader to put there."""
    found: list[tuple[str, Any]] = []
    monkeypatch.chdir(tmp_path)
    config = next(text for page, text in blocks("toml") if page.name == "README.md")
    for file in ("first.toml", "wards.toml", "runs/first/config.toml", "runs/own/config.toml"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(config, "utf-8")
    shutil.copytree(ROOT / "examples", "examples")
    monkeypatch.setattr(cli.console, "prepare_process", lambda threads=0: cli.console.Threads(1, "cores"))
    monkeypatch.setattr(cli, "_execute", lambda config, resume, quiet: found.append(("run", config)))
    monkeypatch.setattr("splitft.apps.server_command.serve", lambda config, insecure, quiet, logs: found.append(("server", config)))
    monkeypatch.setattr("splitft.apps.client_command.join", lambda options: found.append(("client", options)))
    monkeypatch.setattr("splitft.apps.plan_command.show_plan", lambda config: found.append(("plan", config)))
    monkeypatch.setattr("splitft.apps.export.export", lambda run_dir, to, merged: found.append(("export", run_dir)))
    monkeypatch.setattr("splitft.apps.doctor.show", lambda checks: found.append(("doctor", checks)))
    monkeypatch.setattr("splitft.apps.doctor.examine", lambda threads: [])
    return found


@pytest.mark.parametrize("item", splitft_commands(), ids=named)
def test_commands_are_understood(item: tuple[Path, list[str]], started: list[tuple[str, Any]]) -> None:
    if item[1][0] == "enroll":
        understand(item[1])
        return
    result = CliRunner().invoke(cli.app, item[1])
    assert result.exit_code == 0, result.output or result.exception
    [(name, what)] = started
    assert name == {"demo": "run"}.get(item[1][0], item[1][0])
    if isinstance(what, RunConfig):
        build_components(what)


def understand(words: list[str]) -> None:
    """Raises click's error for words that the command line would not take; nothing is carried out."""
    command, context = typer.main.get_command(cli.app), None
    while hasattr(command, "resolve_command"):
        context = command.make_context("splitft", list(words), parent=context)
        words = [*context._protected_args, *context.args]
        _, command, words = command.resolve_command(context, words)
    command.make_context("splitft", list(words), parent=context)


def test_a_wrong_command_would_be_caught(started: list[tuple[str, Any]]) -> None:
    for words in (["run", "first.toml", "train.rate=1"], ["run", "--resumed", "runs/first"], ["train"], ["run", "no.toml"]):
        assert CliRunner().invoke(cli.app, words).exit_code != 0
    for words in (["enroll", "invite"], ["enroll", "join", "TOKEN", "--folder", "x"], ["enroll", "expel", "north"]):
        with pytest.raises(Exception, match=r"Missing|No such"):
            understand(words)
    assert started == []


def test_the_pages_show_commands_at_all() -> None:
    assert {words[0] for _, words in splitft_commands()} >= {"demo", "plan", "run", "export", "server", "client", "enroll"}
    assert ["make", "demo"] in [words for _, words in commands()]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    wanted = {words[1] for _, words in commands() if words[0] == "make"} | set(re.findall(r"`make ([a-z]+)`", README))
    assert wanted
    assert wanted <= targets


@pytest.mark.parametrize(("page", "text"), list(blocks("toml")), ids=lambda value: value.name if isinstance(value, Path) else "")
def test_configurations_load(page: Path, text: str, tmp_path: Path) -> None:
    file = tmp_path / "first.toml"
    file.write_text(text, "utf-8")
    if text.startswith("# policy.toml"):
        assert load_policy(file) != ClientPolicy()
        return
    config = load_config(file)
    assert isinstance(config, RunConfig)
    build_components(config)


def test_a_wrong_configuration_would_be_caught(tmp_path: Path) -> None:
    file = tmp_path / "first.toml"
    file.write_text(next(text for page, text in blocks("toml") if page.name == "README.md").replace("rounds", "round_count"), "utf-8")
    with pytest.raises(ConfigError):
        load_config(file)


def test_python_blocks_use_public_names_only() -> None:
    seen = set()
    for page, text in blocks("python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "splitft":
                assert node.attr in splitft.__all__, f"{page.name}: splitft.{node.attr}"
                seen.add(node.attr)
    assert {"run", "open_run", "load_config"} <= seen


def headings(page: Path) -> set[str]:
    """The anchors of a page as they are made from its headings."""
    found = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def broken_links(page: Path, text: str) -> list[str]:
    bad = []
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
        path, _, anchor = target.partition("#")
        if target.startswith(("https://", "http://")):
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or ROOT not in file.parents or (anchor and anchor not in headings(file)):
            bad.append(f"{page.relative_to(ROOT)}: {target}")
    return bad


def test_links_resolve() -> None:
    assert [fault for page in PAGES for fault in broken_links(page, page.read_text("utf-8"))] == []


def test_broken_links_would_be_caught() -> None:
    assert len(broken_links(ROOT / "README.md", "[a](docs/none.md) [b](#no-such) [c](../outside.md) [d](LICENSE)")) == 3


def test_files_named_in_text_exist() -> None:
    """`tests/...`, `tools/...` and `examples/...` in backquotes, and the source files that tables and sentences name."""
    for page in PAGES:
        for name in re.findall(r"`((?:tests|tools|examples|docs)/[\w./]+)`", BLOCK.sub("", page.read_text("utf-8"))):
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: {name}"


def test_pages_name_no_place_of_a_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|usr|Users)/", page.read_text("utf-8")), page


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
        waiting += [file for link in links if "://" not in link and (file := (page.parent / link).resolve()).is_file()]
    pages = {page for page in PAGES if page.parent != ROOT}
    assert pages - reached == set()


def test_the_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert splitft.__version__ in versions[:2]
