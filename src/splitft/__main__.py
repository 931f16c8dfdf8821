"""`python -m splitft`."""

from __future__ import annotations

from splitft.apps.cli import main

main()
