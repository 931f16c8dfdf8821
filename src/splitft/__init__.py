"""splitft: federated split fine-tuning of language models. Importing this package does not import torch.

The names below are the public Python interface; each is loaded when it is first used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitft.apps.api import load_config, open_run, run, write_report
    from splitft.apps.demo import demo_config
    from splitft.apps.session import FederatedRun
    from splitft.config import RunConfig, parse_config
    from splitft.errors import SplitftError

__version__ = "0.1.0"

__all__ = [
    "FederatedRun",
    "RunConfig",
    "SplitftError",
    "__version__",
    "demo_config",
    "load_config",
    "open_run",
    "parse_config",
    "run",
    "write_report",
]

_HOME = {
    "FederatedRun": "splitft.apps.session",
    "RunConfig": "splitft.config",
    "SplitftError": "splitft.errors",
    "demo_config": "splitft.apps.demo",
    "load_config": "splitft.apps.api",
    "open_run": "splitft.apps.api",
    "parse_config": "splitft.config",
    "run": "splitft.apps.api",
    "write_report": "splitft.apps.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'splitft' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
