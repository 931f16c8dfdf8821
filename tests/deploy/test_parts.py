"""The base model in parts: complete, the same however the checkpoint is laid out, and never in memory as a whole."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from splitft.deploy.letters import PartInfo
from splitft.deploy.parts import ModelParts, block_name, check_table, model_digest, verify_local, wanted_parts
from splitft.deploy.received import check_file, cleaned
from splitft.deploy.tensors import make_header, read_places
from splitft.errors import ModelError, ProtocolError
from splitft.models.load import resolve

from ..support import BLOCKS, build


def saved(folder: Path, family: str = "gpt2", shard: str = "1GB") -> Path:
    build(family).save_pretrained(folder, max_shard_size=shard)
    return folder


def whole(parts: ModelParts, name: str) -> bytes:
    return parts.read(name, 0, parts.info(name).size_bytes)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied", "mixtral", "gpt_neox", "phi"])
def test_parts_hold_every_tensor_once_and_bit_for_bit(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", family)
    parts = ModelParts.of(folder)
    expected = {name: tensor.view(torch.uint8) for name, tensor in load_file(folder / "model.safetensors").items()}
    found: dict[str, torch.Tensor] = {}
    for info in parts.table():
        data = whole(parts, info.name)
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (info.sha256, info.size_bytes)
        if info.name.startswith("file:"):
            continue
        (tmp_path / "part").write_bytes(data)
        for name, tensor in load_file(tmp_path / "part").items():
            assert name not in found
            found[name] = tensor.clone().view(torch.uint8)  # the file is mapped, and written again
        numbers = {word for name in read_places(tmp_path / "part") for word in name.split(".")[:4] if word.isdigit()}
        assert numbers <= ({str(int(info.name[6:]))} if info.name.startswith("block-") else set())
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    names = set(parts.sources)
    assert {block_name(block) for block in range(BLOCKS)} <= names
    assert ("head" in names) == (family not in ("gpt2", "llama-tied"))


def test_one_file_and_shards_have_the_same_digests(tmp_path: Path) -> None:
    one, many = ModelParts.of(saved(tmp_path / "one", "mixtral")), ModelParts.of(saved(tmp_path / "many", "mixtral", "40KB"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert one.table() == many.table() == ModelParts.of(tmp_path / "one").table()
    changed = load_file(tmp_path / "one" / "model.safetensors")
    changed["model.norm.weight"][0] += 1
    save_file(changed, tmp_path / "one" / "model.safetensors", metadata={"format": "pt"})
    after = {part.name: part for part in ModelParts.of(tmp_path / "one").table()}
    assert [part.name for part in many.table() if after[part.name] != part] == ["embedding"]
    assert model_digest(list(after.values())) != model_digest(many.table())


def test_ranges_are_those_of_the_whole(tmp_path: Path) -> None:
    parts = ModelParts.of(saved(tmp_path / "many", "llama", "30KB"))
    for name in parts.sources:
        data = whole(parts, name)
        pieces = [parts.read(name, offset, 997) for offset in range(0, len(data), 997)]
        assert b"".join(pieces) == data
        assert parts.read(name, len(data), 10) == b""
        assert parts.read(name, len(data) - 3, 10) == data[-3:]
        info = parts.info(name)
        assert parts.read_content(info.sha256, 5, 50) == data[5:55]
    for wrong in (("embedding", -1, 5), ("embedding", 1 << 40, 5), ("embedding", 0, -1), ("../config.json", 0, 5)):
        with pytest.raises(ProtocolError):
            parts.read(*wrong)


def test_original_gpt2_names_without_a_prefix(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    parts = ModelParts.of(folder)
    tensors = load_file(folder / "model.safetensors")
    assert all(name.startswith("transformer.") for name in tensors)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare[f"h.{BLOCKS}.ln_1.weight"] = torch.zeros(32)  # behind the last block: nobody's
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    again = ModelParts.of(folder)
    assert set(again.sources) == set(parts.sources)
    for name in again.sources:
        (tmp_path / "part").write_bytes(whole(again, name))
        if name.startswith("block-"):
            assert {one.split(".")[1] for one in read_places(tmp_path / "part")} == {str(int(name[6:]))}
        elif name == "embedding":
            assert set(read_places(tmp_path / "part")) == {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}


def test_a_head_that_is_tied_is_no_part_even_where_the_file_has_it(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama-tied")
    tensors = load_file(folder / "model.safetensors")
    copied = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copied, folder / "model.safetensors", metadata={"format": "pt"})
    parts = ModelParts.of(folder)
    assert "head" not in parts.sources
    (tmp_path / "part").write_bytes(whole(parts, "embedding"))
    assert set(read_places(tmp_path / "part")) == {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"}


def test_digests_are_remembered_until_the_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, remember = saved(tmp_path / "model", "llama"), tmp_path / "digests.json"
    first = ModelParts.of(folder, remember=remember).table()
    kept = json.loads(remember.read_text())
    reads: list[int] = []
    real = ModelParts.of(folder, remember=remember)
    source = type(next(iter(real.sources.values())))
    before = source.read

    def noting(self: object, offset: int, count: int) -> bytes:
        reads.append(count)
        return before(self, offset, count)  # type: ignore[arg-type]

    monkeypatch.setattr(source, "read", noting)
    assert real.table() == first
    assert not reads
    for damage in (b"", b"[]", b'{"state": 1}', json.dumps({**kept, "digests": {"embedding": "x"}}).encode()):
        remember.write_bytes(damage)
        assert ModelParts.of(folder, remember=remember).table() == first
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert ModelParts.of(folder, remember=remember).table() != first
    assert reads


def test_the_embedded_model_has_parts() -> None:
    names = {part.name for part in ModelParts.of(Path(resolve("embedded"))).table()}
    assert {"file:config.json", "file:tokenizer.json", "embedding", "block-0000"} <= names
    assert not {"file:README.md", "file:training.json"} & names


def test_wanted_parts_are_those_of_the_cut(tmp_path: Path) -> None:
    table = ModelParts.of(saved(tmp_path / "model", "llama")).table()
    assert wanted_parts(table, [0, 1], False) == (
        "file:config.json",
        "file:generation_config.json",
        "embedding",
        "block-0000",
        "block-0001",
    )
    assert set(wanted_parts(table, [3], True)) - set(wanted_parts(table, [3], False)) == {"head"}
    with pytest.raises(ModelError, match="block-0004"):
        wanted_parts(table, [4], False)


def test_a_local_checkpoint_is_held_against_the_servers(tmp_path: Path) -> None:
    server = ModelParts.of(saved(tmp_path / "server", "llama"))
    local = saved(tmp_path / "local", "llama", "30KB")
    verify_local(local, server.table(), wanted_parts(server.table(), [0, 1], True))
    index = json.loads((local / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = local / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][0, 0] += 1e-6
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="block-0001"):
        verify_local(local, server.table(), wanted_parts(server.table(), [0, 1], True))
    verify_local(local, server.table(), wanted_parts(server.table(), [0, 3], True))  # what is not used need not agree
    (local / "generation_config.json").unlink()
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        verify_local(local, server.table(), wanted_parts(server.table(), [0], True))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", "llama", "30KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    gone = {name: file for name, file in index["weight_map"].items() if ".layers.2." not in name}
    (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": gone}))
    with pytest.raises(ModelError, match="block-0002"):
        ModelParts.of(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({**index, "weight_map": {**index["weight_map"], "x": "../x.safetensors"}})
    )
    with pytest.raises(ModelError, match="no tensor x"):
        ModelParts.of(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match="neither"):
        ModelParts.of(folder)


def good_table() -> list[PartInfo]:
    names = ["file:config.json", "embedding", "block-0000", "block-0001", "head"]
    return [PartInfo(name, hashlib.sha256(name.encode()).hexdigest(), 10) for name in names]


def test_a_table_of_lies_is_refused() -> None:
    table = good_table()
    assert list(check_table(table, model_digest(table))) == [part.name for part in table]
    lies = [
        [*table, PartInfo("file:../../.bashrc", "0" * 64, 1)],
        [*table, PartInfo("file:modeling_evil.py", "0" * 64, 1)],
        [*table, PartInfo("block-1", "0" * 64, 1)],
        [*table, PartInfo("block-0003", "0" * 64, 1)],
        [*table, PartInfo("embedding", "0" * 64, 1)],
        [*table, PartInfo("block-0002", "../../../etc/passwd", 1)],
        [*table, PartInfo("block-0002", "A" * 64, 1)],
        [*table, PartInfo("block-0002", "0" * 64, -1)],
        [*table, PartInfo("block-0002", "0" * 64, 1 << 60)],
        table[1:],
        [table[0], *table[2:]],
    ]
    for lie in lies:
        with pytest.raises(ProtocolError):
            check_table(lie, model_digest(lie))
    with pytest.raises(ProtocolError, match="its parts make"):
        check_table([msgspec.structs.replace(table[0], sha256="1" * 64), *table[1:]], model_digest(table))


def file_of(path: Path, header: object, values: int = 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(values))
    return path


def entry(begin: int = 0, end: int = 8, shape: object = (2,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert set(read_places(file_of(path, {"a": entry(), "__metadata__": {"format": "pt"}}))) == {"a"}
    twice = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    lies: list[tuple[object, str]] = [
        ({"a": entry(), "b": entry()}, "begins at byte"),  # two at one place
        ({"a": entry(), "b": entry(4, 12)}, "begins at byte"),
        ({"a": entry(4, 12)}, "begins at byte"),  # a gap
        ({"a": entry(0, 4, (1,))}, "the file at"),  # bytes of nobody
        ({"a": entry(0, 16, (4,))}, "the file at"),  # beyond the end
        ({"a": entry(8, 0, (2,))}, "is given -8 bytes"),
        ({"a": entry(-8, 0)}, "no possible place"),
        ({"a": entry(shape=(-2, -1))}, "no possible shape"),
        ({"a": entry(shape=(1 << 61, 1 << 61))}, "no possible shape"),
        ({"a": entry(shape=(1 << 59, 1 << 59))}, "is given 8 bytes"),
        ({"a": entry(shape=(True, 2))}, "no possible shape"),
        ({"a": entry(shape=(1,) * 17 + (2,))}, "no possible shape"),
        ({"a": entry(shape="2")}, "no possible shape"),
        ({"a": entry(dtype="X9")}, "has the type"),
        ({"a": entry(dtype=["F32"])}, "has the type"),
        ({"a": {**entry(), "code": 1}}, "not described"),
        ({"a": 3}, "not described"),
        ({"../../etc/x": entry()}, "is called"),
        ({"a\n": entry()}, "is called"),
        ({"a" * 600: entry()}, "is called"),
        ({"": entry()}, "is called"),
        (["a"], "no table"),
        (twice, "twice"),
        (b"[" * 100_000, "nested"),
        (b"{", "Expecting"),
        (b"\xff\xfe\xff", "decode"),
        ({f"t{i}": entry(0, 0, (0,)) for i in range(100_001)}, "allowed are 100000"),
    ]
    for lie, words in lies:
        with pytest.raises(ValueError, match=words):
            read_places(file_of(path, lie))
    for length in (1 << 20, (16 << 20) + 1, 2**64 - 1):
        with pytest.raises(ValueError, match="claims"):
            read_places(file_of(path, {"a": entry()}, length=length))
    for length in (0, 7):
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            read_places(file_of(path, {"a": entry()}, length=length))
    path.write_bytes(struct.pack("<Q", (16 << 20) + 8) + b" " * (17 << 20))
    with pytest.raises(ValueError, match="claims"):
        read_places(path)
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="claims"):
        read_places(path)


def test_a_header_depends_on_its_tensors_alone(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(3, dtype=torch.float16), "a": torch.ones(2), "c": torch.zeros(0)}, tmp_path / "file")
    places = read_places(tmp_path / "file")
    head, order = make_header(places)
    assert (head, order) == make_header(dict(reversed(places.items())))
    assert order == ["a", "c", "b"]
    assert len(head) % 64 == 0
    raw = (tmp_path / "file").read_bytes()
    (tmp_path / "again").write_bytes(head + b"".join(raw[places[name].begin : places[name].end] for name in order))
    with safe_open(tmp_path / "again", "pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.ones(2))
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling_evil.Evil"}}),
        ("config.json", {"text_config": {"deep": [{"auto_map": {}}]}}),
        ("config.json", {"_attn_implementation": "evil/kernel"}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}),
        ("generation_config.json", {"custom_generate": "evil/repository"}),
        ("config.json", {"trust_remote_code": True}),
    ],
)
def test_what_names_code_is_taken_out_by_the_server_and_refused_by_the_client(name: str, fields: dict[str, object]) -> None:
    data = json.dumps({"model_type": "llama", "vocab_size": 3, **fields}).encode()
    with pytest.raises(ModelError):
        check_file(name, data)
    clean = cleaned(name, data)
    check_file(name, clean)
    assert json.loads(clean)["vocab_size"] == 3
    assert b"evil" not in clean
    untouched = b'{"model_type":   "llama", "vocab_size": 3}'
    assert cleaned(name, untouched) == untouched


@pytest.mark.parametrize(
    "data", [b'{"quantization_config": {"quant_method": "x"}}', b'{"transformers_weights": "../x"}', b"[]", b"{", b"[" * 10**5]
)
def test_what_cannot_be_served_is_refused_by_both(data: bytes) -> None:
    for check in (check_file, cleaned):
        with pytest.raises(ModelError):
            check("config.json", data)
    with pytest.raises(ModelError, match="bytes"):
        check_file("config.json", b" " * ((1 << 20) + 1))


GROWTH = """
import resource, sys
from pathlib import Path
from splitft.deploy.parts import _Source, _tensor_source, _tensors_of
source = _tensor_source(_tensors_of(Path(sys.argv[1])))
source.read(0, 4 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(len(source.read(offset, 4 << 20)) for offset in range(0, source.size_bytes, 4 << 20))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.timeout(100)
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_serving_a_large_checkpoint_takes_no_memory(tmp_path: Path) -> None:
    """A 200 MB part of sparse files read from end to end in a fresh process: its peak grows by less than 32 MiB."""
    tensor_bytes = 10 << 20
    weights: dict[str, str] = {}
    for shard in range(5):
        names = [f"w{shard}_{i}" for i in range(4)]
        header = {name: entry(i * tensor_bytes, (i + 1) * tensor_bytes, (tensor_bytes // 4,)) for i, name in enumerate(names)}
        path = file_of(tmp_path / f"s{shard}.safetensors", header, 0)
        os.truncate(path, path.stat().st_size + 4 * tensor_bytes)
        weights |= dict.fromkeys(names, path.name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    done = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, timeout=90, check=True)
    count, growth_kib = map(int, done.stdout.split())
    assert count > 200 << 20
    assert growth_kib < 32 << 10
