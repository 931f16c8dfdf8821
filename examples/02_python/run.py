"""A run from Python: load a configuration, change it, watch the rounds, read the metrics, open the adapter with stock PEFT.

Usage: python examples/02_python/run.py [FIELD=VALUE]...
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import splitft

CONFIG = Path(__file__).resolve().parents[1] / "01_simulate" / "config.toml"
COLUMNS = ("round", "train_loss", "perplexity", "bytes_up", "bytes_down", "virtual_end_s")


def train(overrides: list[str]) -> tuple[Path, list[dict[str, Any]]]:
    """The run folder and one row of metrics per round."""
    config = splitft.load_config(CONFIG, ["name=from-python", 'clients.profiles=["laptop"]', *overrides])
    with contextlib.closing(splitft.open_run(config)) as run:
        for record in run.rounds():  # what is yielded is on the disk already: leaving the loop loses nothing
            if record.evaluation is not None:
                print(f"round {record.round}: held-out perplexity {record.evaluation['global']['perplexity']:.2f}")
        return run.finish(), run.metrics()


def show(rows: list[dict[str, Any]]) -> None:
    """The metrics as a table; `pandas.DataFrame(rows)` takes them as they are."""
    print("".join(f"{name:>14}" for name in COLUMNS))
    for row in rows:
        print("".join(f"{'-' if row[name] is None else format(row[name], '.6g'):>14}" for name in COLUMNS))


def loss_of_a_line(adapter: Path | None) -> float:
    """The model's loss on one line, by transformers and PEFT alone, splitft not involved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # "embedded" is a plain checkpoint in the package; with a model of your own this is its folder or name.
    base = Path(splitft.__file__).parent / "assets" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    ids = tokenizer("Berth two: the ferry left late because of the fog.", return_tensors="pt").input_ids
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


if __name__ == "__main__":
    folder, table = train(sys.argv[1:])
    show(table)
    print(f"loss of a line by transformers: {loss_of_a_line(None):.3f}")
    if importlib.util.find_spec("peft") is not None:
        print(f"with the adapter, by PEFT:      {loss_of_a_line(folder / 'adapter'):.3f}")
