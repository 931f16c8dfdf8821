"""The demonstration: a federation on embedded defaults, offline, in a minute or two on two cores."""

from __future__ import annotations

from splitft.config import RunConfig, parse_config

DEMO = {
    "name": "demo",
    "rounds": 5,
    "model": {"path": "embedded"},
    "lora": {"rank": 8, "alpha": 16.0, "targets": "all"},
    "data": {"name": "python_docs", "max_documents": 600},
    "tokens": {"packing": "blocks", "block_tokens": 128},
    "partition": {"name": "length_dirichlet", "alpha": 0.5},
    "clients": {"count": 5, "profiles": ["phone", "tablet", "laptop", "desktop", "hospital-server"]},
    "policy": {"name": "fixed", "cuts": [1, 2, 3, 4, 6]},
    "train": {"local_steps": 12, "batch_size": 4, "learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": 4},
    "uplink": {"name": "cast", "dtype": "bfloat16"},
    "downlink": {"name": "cast", "dtype": "bfloat16"},
}


def demo_config() -> RunConfig:
    """The demonstration's configuration: five devices, each with its own cut."""
    return parse_config(DEMO)
