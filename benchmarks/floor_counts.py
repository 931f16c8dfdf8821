"""What a training step of the cohort must compute and move at least, stage by stage, from shapes; and what this machine reaches at best.

Bytes are those that have to pass between memory and processor if every tensor is read and written once; a stage's floor is the time of
its arithmetic at the machine's best product or of its bytes at its best copy, whichever is longer.

Axes: n clients, t tokens, d hidden width, f inner width of a block, i and o widths of a projection, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import setups
from benchmarks.setups import Case
from benchmarks.timing import seconds
from splitft.lora import Layout
from splitft.products import product
from splitft.split import SplitModel

FLOAT_BYTES = 4
PROBES = 20
STAGES = {
    "frozen forward": "frozen products, forward",
    "frozen backward": "frozen products, backward",
    "attention": "attention",
    "low-rank": "low-rank parts",
    "elementwise": "norms, activations, sums, casts",
    "head": "head and loss",
    "wire": "wire",
    "optimizer": "optimizer",
    "rest": "rest: Python, autograd, data",
}


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes; `long`: the bytes are those of all adapters and not of activations."""

    flops: float
    moved_bytes: float
    long: bool = False


@dataclass(frozen=True)
class Machine:
    """The best rates of this run: operations a second by type, bytes a second (read and written) for an activation and for all adapters."""

    flops_per_s: dict[str, float]
    activation_bytes_per_s: float
    adapter_bytes_per_s: float

    def floor_s(self, work: Work, dtype: str) -> float:
        moved = self.adapter_bytes_per_s if work.long else self.activation_bytes_per_s
        return max(work.flops / self.flops_per_s[dtype], work.moved_bytes / moved)


def count(case: Case, split: SplitModel, layout: Layout) -> dict[str, Work]:
    """The work of one optimizer step of all clients, by stage; nothing for the rest."""
    size = setups.DTYPES[case.dtype].itemsize
    rows, blocks, width = case.step_tokens, split.blocks, split.hidden_size
    config = split.model.config
    inner = int(getattr(config, "n_inner", None) or 4 * width)
    vocabulary, predicted = int(config.vocab_size), case.clients * (case.tokens - 1)
    widths = list(split.keys.values())
    weights = sum(i * o for i, o in widths)
    through = sum(i + o for i, o in widths)
    read = rows * (through + sum(i for i, _ in widths))
    # Nothing is trained below the first block, so its first projection needs no gradient of its inputs.
    first_i, first_o = next(pair for key, pair in split.keys.items() if key.block == 0 and key.module.endswith("c_attn"))
    adapters = case.clients * layout.parameters
    return {
        "frozen forward": Work(2.0 * rows * weights, size * (weights + rows * through)),
        "frozen backward": Work(
            2.0 * rows * (weights - first_i * first_o), size * (weights - first_i * first_o + rows * (through - first_i - first_o))
        ),
        # Two products forward and four backward, each over half of the positions.
        "attention": Work(6.0 * case.clients * case.tokens**2 * width * blocks, 12.0 * size * rows * width * blocks),
        # Inputs are read forward and backward, gradients backward; what is added to a frozen product's result needs no pass of its own.
        "low-rank": Work(6.0 * rows * setups.RANK * through, size * (read + 2.0 * adapters) + FLOAT_BYTES * 2.0 * adapters),
        # Forward and backward: two norms (2 + 3 passes), an activation (2 + 3), two residual sums (3 + 3) in a block; one norm behind.
        "elementwise": Work(0.0, size * rows * (blocks * (22.0 * width + 5.0 * inner) + 5.0 * width)),
        "head": Work(4.0 * predicted * width * vocabulary, size * 2.0 * (vocabulary * width + predicted * width)),
        "wire": Work(0.0, 2.0 * rows * width * 2 * (size + 2)),
        # Values and both moments are read and written; gradients are read twice (norm, step) and cleared.
        "optimizer": Work(0.0, 9.0 * FLOAT_BYTES * adapters, long=True),
    }


def probe(case: Case, split: SplitModel, layout: Layout) -> Machine:
    """The machine's best rates at the sizes of this case."""
    width, rows = split.hidden_size, case.step_tokens
    shapes = [(rows, width, 4 * width), (rows, 4 * width, width), (2048, 2048, 2048)]
    rates = {name: max(_product_rate(shape, dtype) for shape in shapes) for name, dtype in setups.DTYPES.items()}
    return Machine(
        rates,
        _copy_rate(rows * 4 * width, setups.DTYPES[case.dtype]),
        _copy_rate(case.clients * layout.parameters, torch.float32),
    )


def _best_s(run: Callable[[], object]) -> float:
    run()
    return min(seconds(run) for _ in range(PROBES))


def _product_rate(shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """Operations a second of [rows i] times [i o], by the better of torch's and the engine's product."""
    rows, inputs, outputs = shape
    left, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    ways: list[Callable[[], Tensor]] = [lambda: left @ weight.T, lambda: product(left, weight)]
    return 2.0 * rows * inputs * outputs / min(_best_s(way) for way in ways)


def _copy_rate(elements: int, dtype: torch.dtype) -> float:
    source = torch.ones(elements, dtype=dtype)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _best_s(lambda: target.copy_(source))
