"""A client's model from fetched parts: exactly the server's, only what is missing, and nothing that was not promised."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from transformers import PreTrainedModel

from splitft.deploy.cache import ModelCache
from splitft.deploy.letters import PartInfo
from splitft.deploy.parts import ModelParts, model_digest, wanted_parts
from splitft.errors import ModelError, ProtocolError, ResourceError
from splitft.models.anatomy import block_count, find_blocks, find_head
from splitft.models.load import load_model, load_model_config, load_tokenizer, resolve

from ..support import BLOCKS, VOCABULARY, build

Damage = Callable[[str, int, bytes], bytes]


class Server:
    """A checkpoint and what was fetched of it; `piece_bytes` at a time, damaged on the way if asked."""

    def __init__(self, folder: Path, piece_bytes: int = 4096) -> None:
        self.parts = ModelParts.of(folder)
        self.table = self.parts.table()
        self.model = model_digest(self.table)
        self.piece_bytes = piece_bytes
        self.fetched: dict[str, int] = {}
        self.damage: Damage = lambda name, offset, data: data
        self.names = {part.sha256: part.name for part in self.table}

    def fetch(self, sha256: str, offset: int) -> bytes:
        name = self.names[sha256]
        data = self.damage(name, offset, self.parts.read_content(sha256, offset, self.piece_bytes))
        self.fetched[name] = self.fetched.get(name, 0) + len(data)
        return data

    def size_bytes(self, *names: str) -> int:
        return sum(part.size_bytes for part in self.table if part.name in names)

    def wanted(self, blocks: Collection[int], needs_exit: bool = False) -> tuple[str, ...]:
        return wanted_parts(self.table, blocks, needs_exit)


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., Server]:
    def make(family: str = "llama", shard: str = "1GB") -> Server:
        build(family).save_pretrained(tmp_path / family, max_shard_size=shard)
        return Server(tmp_path / family)

    return make


def cache_at(tmp_path: Path, **options: Any) -> ModelCache:
    return ModelCache(tmp_path / "cache", **options)


def left_behind(tmp_path: Path) -> list[str]:
    return sorted(entry.name for entry in (tmp_path / "cache" / "parts").iterdir())


def hidden_states(model: PreTrainedModel, blocks: Collection[int], inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The embedding of some tokens, and what each of the blocks, the final norm's neighbours and the head make of the given inputs."""
    _, found = find_blocks(model, block_count(model.config))
    seen: dict[str, torch.Tensor] = {}
    ids = torch.arange(24).view(2, 12) % VOCABULARY
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Module)
    with torch.no_grad():
        seen["embedding"] = embedding(ids)
        extras = {}
        if hasattr(model.model if hasattr(model, "model") else model.transformer, "rotary_emb"):
            extras["position_embeddings"] = model.model.rotary_emb(inputs, torch.arange(12)[None])
        for index in blocks:
            output = found[index](inputs, **extras)
            seen[f"block {index}"] = output[0] if isinstance(output, tuple) else output
    return seen


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied", "mixtral", "gpt_neox"])
@pytest.mark.parametrize(
    ("blocks", "needs_exit"), [([0], False), ([0, 1], False), ([0, 1, 2], False), ([0, 3], True), ([0, 1, 2, 3], True)]
)
def test_a_client_from_parts_is_the_servers_model_bit_for_bit(
    family: str, blocks: list[int], needs_exit: bool, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve(family)
    folder = cache_at(tmp_path).provide(server.table, server.model, server.wanted(blocks, needs_exit), server.fetch)
    config = load_model_config(str(folder))
    client = load_model(str(folder), config, blocks=blocks, needs_exit=needs_exit)
    source = str(tmp_path / family)
    expected = load_model(source, load_model_config(source))
    theirs = dict(expected.named_parameters())
    mine = dict(client.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in mine.items())
    assert set(mine) == set(dict(load_model(source, config, blocks=blocks, needs_exit=needs_exit).named_parameters()))
    if family != "gpt_neox":  # its rotary tables have another home; its parameters were compared
        inputs = torch.linspace(-2, 2, 2 * 12 * 32).view(2, 12, 32)
        found = hidden_states(client, blocks, inputs)
        for name, hidden in hidden_states(expected, blocks, inputs).items():
            assert torch.equal(found[name], hidden), name
    if needs_exit:
        inputs = torch.linspace(-1, 1, 2 * 32).view(2, 32)
        assert torch.equal(find_head(client)[1](inputs), find_head(expected)[1](inputs))
    if len(blocks) == BLOCKS:
        ids = torch.arange(24).view(2, 12)
        assert torch.equal(client(ids).logits, expected(ids).logits)


def test_a_deeper_cut_fetches_that_block_alone(serve: Callable[..., Server], tmp_path: Path) -> None:
    server, cache = serve("mixtral"), cache_at(tmp_path)
    seen: list[tuple[int, int]] = []
    folder = cache.provide(server.table, server.model, server.wanted([0]), server.fetch)
    first = dict(server.fetched)
    assert sum(first.values()) == server.size_bytes(*server.wanted([0]))
    server.fetched.clear()
    again = cache.provide(server.table, server.model, server.wanted([0, 1]), server.fetch, lambda done, total: seen.append((done, total)))
    assert again == folder
    assert server.fetched == {"block-0001": server.size_bytes("block-0001")}
    total = server.size_bytes(*server.wanted([0, 1]))
    assert seen[0] == (total - server.size_bytes("block-0001"), total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    server.fetched.clear()
    ModelCache(tmp_path / "cache").provide(server.table, server.model, server.wanted([0]), server.fetch)
    assert not server.fetched
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"embedding.safetensors", "block-0000.safetensors", "block-0001.safetensors"}
    load_model(str(folder), load_model_config(str(folder)), blocks=[0, 1], needs_exit=False)


def test_another_model_with_equal_blocks_shares_them(serve: Callable[..., Server], tmp_path: Path) -> None:
    one, cache = serve("llama"), cache_at(tmp_path)
    cache.provide(one.table, one.model, one.wanted([0, 1]), one.fetch)
    build("llama").save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    two = Server(tmp_path / "other")
    folder = cache.provide(two.table, two.model, two.wanted([0, 1]), two.fetch)
    assert list(two.fetched) == ["file:config.json"]
    assert load_model_config(str(folder)).rms_norm_eps == 1e-3


class CutError(Exception):
    """The network went away."""


def test_an_interrupted_download_goes_on(serve: Callable[..., Server], tmp_path: Path) -> None:
    server, wanted = serve(), ("file:config.json", "block-0000")

    def break_down(name: str, offset: int, data: bytes) -> bytes:
        if name == "block-0000" and offset >= 3 * 4096:
            raise CutError
        return data

    server.damage = break_down
    with pytest.raises(CutError):
        cache_at(tmp_path).provide(server.table, server.model, wanted, server.fetch)
    assert server.fetched["block-0000"] == 3 * 4096
    server.fetched.clear()
    server.damage = lambda name, offset, data: data
    cache_at(tmp_path).provide(server.table, server.model, wanted, server.fetch)
    assert server.fetched == {"block-0000": server.size_bytes("block-0000") - 3 * 4096}
    assert not [name for name in left_behind(tmp_path) if "part" in name]


@pytest.mark.parametrize("torn", [b"\0" * 5000, b"\0" * 10_000_000])
def test_what_a_crash_left_damaged_is_fetched_again(torn: bytes, serve: Callable[..., Server], tmp_path: Path) -> None:
    server, cache = serve(), cache_at(tmp_path)
    part = next(part for part in server.table if part.name == "block-0000")
    (tmp_path / "cache" / "parts" / f"{part.sha256}.part").write_bytes(torn)
    cache.provide(server.table, server.model, ("file:config.json", "block-0000"), server.fetch)
    assert server.fetched["block-0000"] >= part.size_bytes
    assert hashlib.sha256((tmp_path / "cache" / "parts" / part.sha256).read_bytes()).hexdigest() == part.sha256


def test_a_rotten_copy_is_noticed_and_replaced(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    folder = cache_at(tmp_path).provide(server.table, server.model, server.wanted([0]), server.fetch)
    with (folder / "block-0000.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    server.fetched.clear()
    cache_at(tmp_path).provide(server.table, server.model, server.wanted([0]), server.fetch)
    assert server.fetched == {"block-0000": server.size_bytes("block-0000")}
    assert (folder / "block-0000.safetensors").read_bytes() == server.parts.read("block-0000", 0, 1 << 30)


def flip(name: str, offset: int, data: bytes) -> bytes:
    return data if name != "block-0000" or offset != 4096 else bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip, "arrived with the digest"),
        (lambda name, offset, data: data if offset == 0 else data + b"x" * 99_999, "in pieces of at most"),
        (lambda name, offset, data: b"", "in pieces of at most"),
        (lambda name, offset, data: data * 2000, "in pieces of at most"),
    ],
    ids=["flipped", "longer", "empty", "oversize"],
)
def test_content_that_was_not_promised_is_refused_and_gone(
    damage: Damage, words: str, serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve()
    server.damage = lambda name, offset, data: damage(name, offset, data) if name == "block-0000" else data
    with pytest.raises(ProtocolError, match=rf"block-0000.*{words}"):
        cache_at(tmp_path).provide(server.table, server.model, ("file:config.json", "block-0000"), server.fetch)
    assert left_behind(tmp_path) == [next(part.sha256 for part in server.table if part.name == "file:config.json")]
    assert not list((tmp_path / "cache" / "models").iterdir())


class Liar:
    """Serves given contents under given names, with true digests."""

    def __init__(self, contents: dict[str, bytes]) -> None:
        self.contents = {hashlib.sha256(data).hexdigest(): data for data in contents.values()}
        self.table = [PartInfo(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in contents.items()]
        self.model = model_digest(self.table)

    def fetch(self, sha256: str, offset: int) -> bytes:
        return self.contents[sha256][offset : offset + 4096]


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("file:config.json", b'{"model_type": "llama", "auto_map": {"AutoConfig": "evil.Config"}}', ModelError),
        ("file:config.json", b'{"model_type": "llama", "quantization_config": {"quant_method": "evil"}}', ModelError),
        ("file:config.json", b"not json", ModelError),
        ("file:config.json", b" " * ((1 << 20) + 1), ProtocolError),
        ("file:tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["evil.T", null]}}', ModelError),
        ("block-0000", b"\x80\x04cposix\nsystem\n", ProtocolError),
        ("block-0000", b"\xff" * 8 + b"{}", ProtocolError),
        ("block-0001", None, ProtocolError),
        ("block-0003", None, ProtocolError),
    ],
)
def test_true_digests_of_bad_content_do_not_help(
    name: str, data: bytes | None, error: type[Exception], serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve()
    honest = {part.name: server.parts.read(part.name, 0, 1 << 30) for part in server.table}
    replaced = {"block-0001": honest["block-0000"], "block-0003": None}.get(name) if data is None else data
    contents = {key: value for key, value in {**honest, name: replaced}.items() if value is not None}
    liar = Liar(contents)
    with pytest.raises(error):
        cache_at(tmp_path).provide(liar.table, liar.model, [part.name for part in liar.table], liar.fetch)
    if data is not None:
        assert hashlib.sha256(data).hexdigest() not in " ".join(left_behind(tmp_path))


def test_a_name_never_becomes_a_path(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    before = sorted(tmp_path.rglob("*"))
    cache = cache_at(tmp_path)
    for wrong in ("file:../../../escaped", "file:/etc/escaped", "file:evil.py", "block-0000/../../escaped"):
        table = [*server.table, PartInfo(wrong, server.table[0].sha256, server.table[0].size_bytes)]
        with pytest.raises(ProtocolError):
            cache.provide(table, model_digest(table), [wrong], server.fetch)
    for sha256 in ("../escaped", "A" * 64, ""):
        table = [msgspec.structs.replace(server.table[0], sha256=sha256), *server.table[1:]]
        with pytest.raises(ProtocolError):
            cache.provide(table, model_digest(table), [table[0].name], server.fetch)
    with pytest.raises(ProtocolError):
        cache.provide(server.table, "../../escaped", server.wanted([0]), server.fetch)
    assert not server.fetched
    made = {path for path in tmp_path.rglob("*") if path not in before}
    assert made == {tmp_path / "cache", tmp_path / "cache" / "parts", tmp_path / "cache" / "models"}


def test_limits_hold_before_anything_is_taken(serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    needed = server.size_bytes(*server.wanted([0]))
    with pytest.raises(ResourceError, match=r"MB.*maximum_model_mb"):
        cache_at(tmp_path, limit_bytes=needed - 1).provide(server.table, server.model, server.wanted([0]), server.fetch)
    free = shutil.disk_usage(tmp_path)._replace(free=needed + 999)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(ResourceError, match="MB"):
        cache_at(tmp_path, reserve_bytes=1000).provide(server.table, server.model, server.wanted([0]), server.fetch)
    assert not server.fetched
    assert not left_behind(tmp_path)
    cache_at(tmp_path, limit_bytes=needed, reserve_bytes=999).provide(server.table, server.model, server.wanted([0]), server.fetch)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_and_the_rest_is_kept(serve: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real ENOSPC, from the kernel, in the middle of a part."""
    server, wanted = serve(), ("file:config.json", "block-0000")
    cache = cache_at(tmp_path)
    real = ModelCache._fill

    def onto_a_full_disk(self: ModelCache, part: PartInfo, file: Any, *rest: Any) -> str:
        if part.name == "block-0000":
            file.write(server.parts.read("block-0000", 0, 5000))
            with open("/dev/full", "wb", buffering=0) as full:
                return real(self, part, full, *rest) if full.write(b"x") else ""
        return real(self, part, file, *rest)

    monkeypatch.setattr(ModelCache, "_fill", onto_a_full_disk)
    with pytest.raises(ResourceError, match="No space left"):
        cache.provide(server.table, server.model, wanted, server.fetch)
    monkeypatch.undo()
    server.fetched.clear()
    cache.provide(server.table, server.model, wanted, server.fetch)
    assert server.fetched == {"block-0000": server.size_bytes("block-0000") - 5000}


@pytest.mark.timeout(60)
def test_several_clients_may_share_a_cache(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    servers = [Server(tmp_path / "llama", piece_bytes=1024) for _ in range(4)]
    folders: list[Path] = []
    begin = threading.Barrier(len(servers))

    def client(number: int) -> None:
        cache = cache_at(tmp_path)
        begin.wait(20)
        one = servers[number]
        folders.append(cache.provide(one.table, one.model, one.wanted(range(number + 1), number == 3), one.fetch))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(servers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert len(folders) == len(servers)
    assert len(set(folders)) == 1
    assert set(left_behind(tmp_path)) == {part.sha256 for part in server.table}
    model = load_model(str(folders[0]), load_model_config(str(folders[0])))
    expected = load_model(str(tmp_path / "llama"), load_model_config(str(tmp_path / "llama")))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.parameters(), expected.parameters(), strict=True))


def test_what_a_killed_process_left_of_its_own_is_swept(tmp_path: Path) -> None:
    cache_at(tmp_path)
    (tmp_path / "cache" / "parts" / f"{'a' * 64}.part-0011").write_bytes(b"half")
    (tmp_path / "cache" / "parts" / f"{'a' * 64}.part").write_bytes(b"half")
    cache_at(tmp_path)
    assert left_behind(tmp_path) == [f"{'a' * 64}.part"]


def test_only_the_owner_reads_the_cache(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    folder = cache_at(tmp_path).provide(server.table, server.model, server.wanted([0]), server.fetch)
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert folder.parent.parent == tmp_path / "cache"


def test_the_embedded_model_with_its_tokenizer(tmp_path: Path) -> None:
    server = Server(Path(resolve("embedded")), piece_bytes=1 << 20)
    folder = cache_at(tmp_path).provide(server.table, server.model, server.wanted([0]), server.fetch)
    text = "def f(x):\n    return x  # été"
    assert load_tokenizer(str(folder))(text)["input_ids"] == load_tokenizer("embedded")(text)["input_ids"]
    model = load_model(str(folder), load_model_config(str(folder)), blocks=[0], needs_exit=False)
    expected = dict(load_model("embedded", load_model_config("embedded")).named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())
