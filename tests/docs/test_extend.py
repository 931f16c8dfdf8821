"""The files printed in docs/extend.md are complete: each is loaded as it stands, entered where the page says, and used in a run."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from splitft import catalog
from splitft.apps.session import FederatedRun
from splitft.compress.base import HEADER_BYTES
from splitft.config import override
from splitft.engine.settings import same_start
from splitft.engine.workers import WorkersExecutor
from splitft.errors import ConfigError
from splitft.transport.inproc import InProcess
from splitft.types import Plan, RoundPlan

from ..support import federation
from ..tiny_run import tiny_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extend.md").read_text("utf-8")
FILES = dict(re.findall(r"^`src/(splitft/[\w/]+)\.py`:\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
ENTRIES = re.findall(r'^In `([A-Z_]+)`: `"(\w+)": (\w+),`', PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    """Every file of the page, imported under the name it would have in the package."""
    folder, loaded = tmp_path_factory.mktemp("extend"), {}
    for path, code in FILES.items():
        file, name = folder / f"{path.replace('/', '_')}.py", path.replace("/", ".")
        file.write_text(code, "utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        loaded[name] = module
    yield loaded
    for name in loaded:
        del sys.modules[name]


@pytest.fixture
def entered(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines in the catalogue that the page asks for."""
    for (table, name, cls), module in zip(ENTRIES, modules.values(), strict=True):
        monkeypatch.setitem(getattr(catalog, table), name, getattr(module, cls))


def test_one_file_and_one_line_for_every_table_of_the_catalogue() -> None:
    tables = {table for table, _, _ in ENTRIES}
    assert tables == {name for name, table in vars(catalog).items() if name.isupper() and isinstance(table, dict)} - {"CATALOG", "INNER"}
    assert len(ENTRIES) == len(FILES) == len(tables) + 2, "one of each, and an aggregator and a codec over another"
    assert all(not (ROOT / "src" / f"{path}.py").exists() for path in FILES), "an example has become part of the package: choose another"


@pytest.mark.usefixtures("entered")
def test_a_run_can_use_all_of_them(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        data={"name": "csv", "path": str(tmp_path / "table.csv")},
        partition={"name": "shares", "shares": [1.0, 2.0, 3.0]},
        clients={"profiles": ["phone", "laptop", "hospital-server"]},
        policy={"name": "waiting", "share": 0.2},
        uplink={"name": "int8"},
        downlink={"name": "int8"},
        aggregator={"name": "momentum", "beta": 0.5},
    )
    lines = [f'{number},"words of row {number}, and some more of them"' for number in range(40)]
    (tmp_path / "table.csv").write_text("number,text\n" + "\n".join(lines) + "\n", "utf-8")
    run = FederatedRun(config)
    try:
        records = [record for record in run.rounds() if record.training is not None]
    finally:
        run.close()
    cuts = [[client["cut"] for client in record.training["clients"]] for record in records if record.training]
    assert cuts[0] == [1, 1, 1]
    assert max(cuts[-1]) > 1, "the fast clients wait for the phone and go deeper"
    assert cuts[-1][0] == 1, "the slowest client never waits"
    assert "velocity" in run.state.aggregator
    documents = [client.documents for client in run.assembly.data.clients]
    assert documents == sorted(documents)
    assert documents[2] > 2 * documents[0]
    # 32 wide, two rows of 16 tokens, two steps: a byte a value, four a token, a header each.
    assert records[0].training is not None
    assert records[0].training["clients"][0]["bytes"]["up"]["activations"] == 2 * (2 * 16 * (32 + 4) + HEADER_BYTES)
    with pytest.raises(ConfigError, match="policy"):
        FederatedRun(override(config, ["policy.first=99", "name=other"]))


@pytest.mark.usefixtures("entered")
def test_ranks_work_and_a_rule_over_another_in_one_run(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        clients={"profiles": ["phone", "laptop", "hospital-server"]},
        lora={"rank": 4},
        ranks={"name": "rising", "first": 2},
        work={"name": "median"},
        train={"local_steps": 4},
        aggregator={"name": "damped", "share": 0.5, "rule": "product"},
    )
    change: dict[float, torch.Tensor] = {}
    for share in (0.5, 1.0):
        run = FederatedRun(override(config, [f"aggregator.share={share}", f"name=share-{share}"]))
        start = run.state.adapters.clone()
        try:
            record = next(record for record in run.rounds() if record.training is not None)
        finally:
            run.close()
        change[share] = run.state.adapters - start
        assert record.training is not None
        clients = record.training["clients"]
        assert [client["ranks"][0] for client in clients] == [2, 2, 2]
        assert [client["ranks"][-1] for client in clients] == [4, 4, 4]
        assert clients[0]["steps"] < clients[1]["steps"] == clients[2]["steps"] == 4
        assert "discarded_energy" in record.training["metrics"]
    torch.testing.assert_close(2 * change[0.5], change[1.0], rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="damped"):
        FederatedRun(override(config, ["aggregator.rule=stack", "name=other"]))


@pytest.mark.usefixtures("entered")
def test_a_synchronisation_rule_decides_when_to_merge(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, rounds=5, synchronisation={"name": "periodic", "rounds": 2})
    run = FederatedRun(config)
    try:
        rounds = [record.training for record in run.rounds() if record.training is not None]
    finally:
        run.close()
    assert [event["aggregated"] for event in rounds] == [False, True, False, True, True], "the last round always merges"
    assert [event["metrics"]["rounds_since_aggregation"] for event in rounds] == [1, 2, 1, 2, 1]
    adapters_up = [event["clients"][0]["bytes"]["up"]["adapters"] for event in rounds]
    assert [count > 0 for count in adapters_up] == [False, True, False, True, True]


def test_the_codec_keeps_its_word(modules: dict[str, ModuleType]) -> None:
    codec = modules["splitft.compress.int8"].Int8()
    assert codec.number not in {one.number for one in catalog.CODECS.values()}
    tensor = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None]
    packet, _ = codec.encode(tensor, codec.init())
    decoded, _ = codec.decode(packet, codec.init())
    assert packet.size_bytes == codec.packet_bytes(tensor.shape, tensor.dtype)
    assert ((decoded - tensor).abs() <= tensor.abs().amax(-1, keepdim=True) / 253).all()


def test_the_codec_over_another_follows_its_own_bytes(modules: dict[str, ModuleType]) -> None:
    codec = modules["splitft.compress.offset"].Offset(modules["splitft.compress.int8"].Int8())
    assert codec.number not in {one.number for one in catalog.CODECS.values()}
    generator = torch.Generator().manual_seed(0)
    sender = receiver = codec.init()
    for size in (5, 1, 9):
        tensor = 100.0 + torch.randn(size, 33, generator=generator)
        packet, after = codec.encode(tensor, sender)
        decoded, receiver = codec.decode(packet, receiver)
        assert packet.size_bytes == codec.packet_bytes(tensor.shape, tensor.dtype)
        largest = (tensor - (0.0 if sender.own is None else sender.own)).abs().amax(-1, keepdim=True)
        assert ((decoded - tensor).abs() <= largest / 250).all(), "an eighth bit of what is left, once a row is known"
        assert torch.equal(after.own, receiver.own)
        assert torch.equal(codec.restore(codec.flatten(after)).own, after.own)
        sender = after
    with pytest.raises(ConfigError, match="offset"):
        type(codec)(catalog.CODECS["temporal"]())


@pytest.mark.usefixtures("entered")
def test_a_codec_over_another_and_a_controller_in_one_run(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        rounds=4,
        uplink={"name": "offset", "inner": "error_bounded"},
        controller={"name": "opening", "factor": 2.0, "most": 4.0},
    )
    run = FederatedRun(config)
    try:
        rounds = [record.training for record in run.rounds() if record.training is not None]
    finally:
        run.close()
    assert [event["dial"]["activations"] for event in rounds] == [1.0, 2.0, 4.0, 4.0]
    sent = [sum(client["bytes"]["up"]["activations"] for client in event["clients"]) for event in rounds]
    assert sent[0] > sent[1] > sent[2], "coarser steps need fewer bytes"


@pytest.mark.parametrize("u_shape", [False, True])
def test_the_transport_gives_the_numbers_of_the_one_in_the_package(modules: dict[str, ModuleType], u_shape: bool) -> None:
    fed = federation(clients=3)
    plan = RoundPlan(1, tuple(Plan(k, k + 1, 2, 3, u_shape) for k in range(3)))
    start = fed.layout.initial_row(1)
    transports = (InProcess(), modules["splitft.transport.one_by_one"].OneByOne())
    first, second = (WorkersExecutor(fed, one).train(plan, 0, same_start(start), {}, lambda count: None) for one in transports)
    assert torch.equal(first.values, second.values)
    assert first.ledger.clients == second.ledger.clients
