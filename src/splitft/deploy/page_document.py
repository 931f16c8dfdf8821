"""The status page as one document: markup, style and script in one, and the policy that lets a browser run nothing else."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from splitft.deploy.page_style import style_sheet

ASSETS = Path(__file__).resolve().parents[1] / "assets" / "status"
_STYLE_MARK, _SCRIPT_MARK = "/*STYLE*/", "/*SCRIPT*/"


@dataclass(frozen=True)
class Document:
    """The page, and the Content-Security-Policy that goes with it."""

    html: bytes
    policy: str


def page_document() -> Document:
    """The same bytes every time; what it shows, its script fetches from `/status.json`."""
    style, script = style_sheet(), "".join((ASSETS / name).read_text("utf-8") for name in ("charts.js", "page.js"))
    html = (ASSETS / "page.html").read_text("utf-8").replace(_STYLE_MARK, style).replace(_SCRIPT_MARK, script)
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Document(html.encode("utf-8"), policy)


def _digest(text: str) -> str:
    """The name by which a policy allows exactly this inline text."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
