"""engine/tensor_file.py: the safetensors format written and read in pieces, against the safetensors library as the oracle."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from splitft.engine import tensor_file
from splitft.engine.tensor_file import Form
from splitft.rng import torch_stream


def tensors() -> dict[str, Tensor]:
    drawn = torch.randn(6, 7, generator=torch_stream(0, "tensor-file-test"))
    return {
        "bool": drawn[0] > 0,
        "bytes": (drawn * 10).to(torch.int8),
        "half": drawn.to(torch.bfloat16),
        "wide": drawn.double(),
        "count": torch.tensor(5),
        "nothing": torch.zeros(0, 3),
        "turned": drawn.T,
        "every other": drawn[::2],
        "ümläut": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }


def equal(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))


def test_the_library_reads_what_is_written_and_the_digest_is_the_file_s(tmp_path: Path) -> None:
    digest = tensor_file.write(tmp_path / "x", tensors())
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest() == tensor_file.digest_of(tmp_path / "x")
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors().keys()
    assert all(equal(found[name], tensor) for name, tensor in tensors().items())


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors().items()}, tmp_path / "x", {"a": "note"})
    found = tensor_file.read(tmp_path / "x")
    assert found.keys() == tensors().keys()
    assert all(equal(found[name], tensor) for name, tensor in tensors().items())


def test_nothing_at_all_can_be_written_and_read(tmp_path: Path) -> None:
    tensor_file.write(tmp_path / "x", {})
    assert tensor_file.read(tmp_path / "x") == load_file(tmp_path / "x") == {}


def test_values_are_aligned_to_their_width(tmp_path: Path) -> None:
    tensor_file.write(tmp_path / "x", {"a": torch.zeros(3, dtype=torch.int8), "b": torch.zeros(5, dtype=torch.float64)})
    data = (tmp_path / "x").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert (start + header["b"]["data_offsets"][0]) % 8 == 0


def test_tensors_are_read_to_where_they_are_wanted(tmp_path: Path) -> None:
    tensor_file.write(tmp_path / "x", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)})
    room = torch.zeros(4, 3)
    found = tensor_file.read(tmp_path / "x", lambda name, form: room[1:3] if name == "a" else None)
    assert found["a"].data_ptr() == room[1:3].data_ptr()
    assert room.tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5], [0, 0, 0]]
    with pytest.raises(ValueError, match="a has the form"):
        tensor_file.read(tmp_path / "x", lambda name, form: torch.zeros(5))


def test_a_reserved_file_can_be_mapped_filled_and_opened_by_the_library(tmp_path: Path) -> None:
    start = tensor_file.create(tmp_path / "x", "rows", torch.float32, (3, 5))
    values = np.memmap(tmp_path / "x", dtype=np.float32, mode="r+", offset=start, shape=(3, 5))
    values[1] = np.arange(5)
    values.flush()
    with safe_open(tmp_path / "x", framework="pt") as file:
        assert file.get_tensor("rows").tolist() == [[0] * 5, [0, 1, 2, 3, 4], [0] * 5]


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, cut: int) -> None:
    tensor_file.write(tmp_path / "x", tensors())
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"header|ends inside|does not lie|Expecting|column"):
        tensor_file.read(tmp_path / "x")


def test_a_header_that_promises_too_much_reserves_nothing(tmp_path: Path) -> None:
    """A huge shape or header length must fail before memory is asked for."""
    table = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    text = json.dumps(table).encode()
    for length in (len(text), 1 << 60):
        (tmp_path / "x").write_bytes(struct.pack("<Q", length) + text)
        with pytest.raises(ValueError, match=r"longer than the file|does not lie"):
            tensor_file.read(tmp_path / "x")


@pytest.mark.parametrize(
    "facts",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
    ],
)
def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path, facts: dict[str, object]) -> None:
    text = json.dumps({"a": facts}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(ValueError, match="does not lie"):
        tensor_file.read(tmp_path / "x")


def test_the_size_of_a_form() -> None:
    assert Form(torch.bfloat16, (3, 5)).size_bytes == 30
    assert Form(torch.float64, ()).size_bytes == 8
