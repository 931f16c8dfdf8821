"""`python -m splitft`."""

from splitft.apps.cli import main

main()
