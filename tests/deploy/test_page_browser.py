"""The status page in a real browser: it shows what the server says, runs nothing a client has written, asks nobody else, fits."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from splitft.apps import report_style
from splitft.deploy import page_document as document_module
from splitft.deploy import page_style
from splitft.deploy.page import PageLimits, StatusPage
from splitft.deploy.page_document import page_document
from splitft.deploy.status import SeatChanges, ServerStatus
from splitft.waits import Waits

from . import status_scenes as scenes

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
EVIL = (
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=1">',
    "\x1b[31m\u202egnp.exe\nsecond line",
    "</title></svg><b>bold",
)
# Appended to the page's own script: what a test wants to know of the layout, written where the dumped document shows it.
MEASURE = """
setTimeout(() => {
  document.body.dataset.wider = document.documentElement.scrollWidth - innerWidth;
  const box = document.querySelector(".scroll");
  document.body.dataset.hidden = box.scrollWidth - box.clientWidth;
  const svgs = [...document.querySelectorAll(".plot svg")];
  document.body.dataset.clipped = svgs.filter((svg) => svg.getBoundingClientRect().right > innerWidth).length;
}, 1000);
"""

pytestmark = pytest.mark.timeout(90)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")


@dataclass
class Seen:
    """What came of a visit: the document after its script ran, what the console said, every address that was asked."""

    dom: str
    console: list[str]
    asked: list[str]

    def text(self, place: str) -> str:
        found = re.search(rf'id="{place}"[^>]*>(.*?)</', self.dom, re.DOTALL)
        assert found is not None, place
        return unescape(found[1])

    def data(self, name: str) -> int:
        found = re.search(rf'data-{name}="(-?\d+)"', self.dom)
        assert found is not None, name
        return int(found[1])


def visit(url: str, folder: Path, width: int = 1400, height: int = 1000, budget_ms: int = 3000) -> Seen:
    assert BROWSER is not None
    log = folder / "net.json"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command += ["--hide-scrollbars", "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # the browser's own calls home go nowhere
    command += ["--enable-logging=stderr", f"--log-net-log={log}", f"--virtual-time-budget={budget_ms}"]
    command += [f"--window-size={width},{height}", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(done.stdout, console, asked_by_page(json.loads(log.read_text("utf-8"))))


def asked_by_page(log: dict[str, Any]) -> list[str]:
    """Addresses that documents of this machine asked for; what the browser asks on its own account is left out."""
    found = set()
    for event in log["events"]:
        told = event.get("params") or {}
        if "url" in told and "127.0.0.1" in f"{told.get('initiator')} {told.get('network_isolation_key')} {told['url']}":
            found.add(str(told["url"]))
    return sorted(found)


@pytest.fixture
def live() -> Iterator[StatusPage]:
    waits = Waits()
    status, metrics = scenes.running(waits=waits)
    scenes.midway(status, metrics)
    page = StatusPage("127.0.0.1:0", status, metrics)
    page.start()
    with waits.waiting("activations of step 10", "ucsf-medical"):
        yield page
    page.stop()


@browser
def test_it_shows_clients_curves_events_and_waits(live: StatusPage, tmp_path: Path) -> None:
    seen = visit(live.url, tmp_path)
    assert seen.console == []
    assert f"{live.url}status.json" in seen.asked
    assert [address for address in seen.asked if not address.startswith(live.url)] == []
    for name in scenes.NAMES:
        assert name in seen.dom
    assert seen.text("run") == "discharge-letters"
    assert seen.text("stage").startswith("Round 8 of 20: training, 3 of 4 clients")
    assert len(re.findall(r'class="who"', seen.dom)) == 4
    assert re.findall(r'class="chip s-(\w+)"', seen.dom) == ["training", "waiting", "training", "lost"]
    assert len(re.findall(r'<path class="curve ', seen.dom)) == 2
    assert len(re.findall(r'<polyline class="curve thin', seen.dom)) == 4
    assert len(re.findall(r'<rect class="bar c5"', seen.dom)) == 7
    assert len(re.findall(r'<rect class="bar g-server"', seen.dom)) == 4 * 3
    assert "values that are not finite" in seen.dom
    assert "activations of step 10" in seen.dom
    assert '<div class="gone" id="gone" role="alert" hidden="">' in seen.dom


@browser
def test_what_clients_write_stays_text(tmp_path: Path) -> None:
    status, metrics = scenes.running(EVIL)
    for text in EVIL:
        status.event("error", text, 0)
        status.stage(text)
    page = StatusPage("127.0.0.1:0", status, metrics)
    page.start()
    try:
        seen = visit(page.url, tmp_path)
    finally:
        page.stop()
    assert seen.console == []
    assert [address for address in seen.asked if not address.startswith(page.url)] == []
    assert "<title>discharge-letters" in seen.dom
    assert "&lt;script&gt;document.title" in seen.dom
    assert len(re.findall(r"<script", seen.dom)) == 1
    assert "<img" not in seen.dom
    assert "\x1b" not in seen.dom
    assert "\u202e" not in seen.dom
    assert "\\x1b[31m\\u202egnp.exe\\nsecond line" in seen.dom


@browser
def test_it_says_so_when_the_server_goes_away(tmp_path: Path) -> None:
    looks: list[int] = []

    def probe() -> dict[int, SeatChanges]:
        looks.append(1)
        if len(looks) == 2:
            threading.Thread(target=page.stop).start()
        return {}

    _, metrics = scenes.running(rounds_done=0)
    page = StatusPage("127.0.0.1:0", ServerStatus("a-run", 3, probe=probe), metrics, limits=PageLimits(fresh_s=0.0))
    page.start()
    seen = visit(page.url, tmp_path, budget_ms=30_000)
    page.stop()
    assert len(looks) in (2, 3)
    assert seen.text("gone").startswith("The server does not answer; what is below is of ")
    assert '<body class="stale">' in seen.dom
    assert seen.text("run") == "a-run"


@browser
@pytest.mark.parametrize("clients", [0, 1, 130])
def test_other_sizes_of_federation(tmp_path: Path, clients: int) -> None:
    names = tuple(f"site-{index}" for index in range(clients))
    page = StatusPage("127.0.0.1:0", *scenes.running(names, rounds_done=0 if clients == 0 else 2))
    page.start()
    try:
        seen = visit(page.url, tmp_path)
    finally:
        page.stop()
    assert seen.console == []
    assert len(re.findall(r'class="who"', seen.dom)) == clients
    shown = re.sub(r"<script.*?</script>", "", seen.dom, flags=re.DOTALL)
    assert "NaN" not in shown
    assert "undefined" not in shown


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of the page's assets whose script a test may add to."""
    copy = tmp_path / "assets"
    shutil.copytree(document_module.ASSETS, copy)
    monkeypatch.setattr(document_module, "ASSETS", copy)
    return copy / "page.js"


@browser
@pytest.mark.parametrize("width", [420, 800, 1024, 1200, 1400, 1600])
def test_it_fits(measured: Path, tmp_path: Path, width: int) -> None:
    measured.write_text(measured.read_text("utf-8") + MEASURE, "utf-8")
    names = ("a" * 80, "b c " * 20, "x", "karolinska-institutet")
    status, metrics = scenes.running(names)
    scenes.midway(status, metrics)
    status.event("error", "w" * 250, 0)
    page = StatusPage("127.0.0.1:0", status, metrics)
    page.start()
    try:
        seen = visit(page.url, tmp_path, width, 900)
    finally:
        page.stop()
    assert seen.console == []
    assert seen.data("wider") <= 0
    assert seen.data("hidden") <= 0
    assert seen.data("clipped") == 0


@browser
def test_the_policy_stops_what_was_slipped_in(measured: Path, tmp_path: Path) -> None:
    """The broken twin: a script that is not the page's own, and one of the page's own that breaks; the checks above see both."""
    measured.write_text(measured.read_text("utf-8") + "\nfetch('http://127.0.0.1:9/'); throw new Error('broken');\n", "utf-8")
    page = StatusPage("127.0.0.1:0", *scenes.running(rounds_done=1))
    slipped = page_document().html.replace(b"<header>", b"<script>document.title='owned'</script><header>")
    page._document = document_module.Document(slipped, page_document().policy)
    page.start()
    try:
        seen = visit(page.url, tmp_path)
    finally:
        page.stop()
    assert any("violates the following Content Security Policy directive" in line and "script-src" in line for line in seen.console)
    assert any("connect-src" in line for line in seen.console)
    assert any("broken" in line for line in seen.console)
    assert "owned" not in re.sub(r"<script.*?</script>", "", seen.dom, flags=re.DOTALL)


@browser
def test_a_request_elsewhere_would_be_seen(measured: Path, tmp_path: Path) -> None:
    """The broken twin without the policy: the list of addresses catches what it would have stopped."""
    measured.write_text(measured.read_text("utf-8") + "\nfetch('http://elsewhere.example/').catch(() => 0);\n", "utf-8")
    page = StatusPage("127.0.0.1:0", *scenes.running(rounds_done=1))
    page._document = document_module.Document(page_document().html, "default-src * 'unsafe-inline'")
    page.start()
    try:
        seen = visit(page.url, tmp_path)
    finally:
        page.stop()
    assert "http://elsewhere.example/" in seen.asked


def test_the_colours_are_the_report_s() -> None:
    for own, report in ((page_style.LIGHT, report_style.LIGHT), (page_style.DARK, report_style.DARK)):
        assert own == {name: report[name] for name in own}
        assert list(page_style.LIGHT) == list(own)


def test_the_document_is_whole_small_and_the_same_every_time() -> None:
    page = page_document()
    assert page == page_document()
    html = page.html.decode("utf-8")
    assert len(page.html) < 60_000
    assert "/*STYLE*/" not in html
    assert "/*SCRIPT*/" not in html
    assert re.findall(r'(?:src|href)="(?!data:)', html) == []
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", html) == []
    script = (document_module.ASSETS / "page.js").read_text("utf-8") + (document_module.ASSETS / "charts.js").read_text("utf-8")
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert forbidden not in script
    used = set(re.findall(r"var\(--([\w-]+)\)", html)) - {"c", "t"}
    assert used <= set(page_style.LIGHT)


def test_snapshots_are_what_the_script_reads() -> None:
    """Every name the script takes from the status is one the status has."""
    status, metrics = scenes.running()
    scenes.midway(status, metrics)
    told = json.loads(json.dumps(status.snapshot()))
    script = (document_module.ASSETS / "page.js").read_text("utf-8")
    assert set(re.findall(r"(?<!/)\bstatus\.(\w+)", script)) <= set(told)
    assert set(re.findall(r"\bseat\.(\w+)", script)) <= set(told["seats"][0])
    assert set(re.findall(r"\btotals\.(\w+)", script)) <= set(told["totals"])
    assert set(re.findall(r"\bcurves\.(\w+)", script)) <= set(told["curves"])
