"""Each side reads only the tensors it owns, and a federation of partly loaded sides gives the numbers of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from splitft.engine.client import Client
from splitft.engine.exchange import Ownership, round_start_frame, take
from splitft.engine.server import Server
from splitft.engine.settings import ClientState, Federation, same_start
from splitft.lora import Layout
from splitft.models.load import load_model, load_model_config
from splitft.selfcheck import inspect_family
from splitft.split import SplitModel
from splitft.transport.inproc import InProcess
from splitft.types import Plan, RoundPlan

from ..support import BLOCKS, FAMILIES, VOCABULARY, build, federation


def without_blocks(source: Path, target: Path, absent: list[int], blocks_path: str) -> Path:
    """A copy of a checkpoint in which the given blocks' tensors do not exist: whoever reads one fails."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    with safe_open(source / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if not any(f"{blocks_path.split('.')[-1]}.{block}." in name for block in absent)]  # noqa: SIM118
        save_file({name: file.get_tensor(name) for name in names}, target / "model.safetensors", metadata={"format": "pt"})
        assert len(names) < len(list(file.keys()))
    return target


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied", "opt", "bloom", "gemma2", "phi", "mixtral"])
def test_a_client_at_cut_two_never_reads_the_other_blocks(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "whole")
    anatomy = inspect_family(FAMILIES[family](), family)
    config = load_model_config(str(tmp_path / "whole"))
    bare = without_blocks(tmp_path / "whole", tmp_path / "bare", [2, 3], anatomy.blocks_path)
    model = load_model(str(bare), config, blocks=[0, 1], needs_exit=False)
    stored = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert not any(f"{anatomy.blocks_path}.{block}." in name for block in (2, 3) for name in stored)
    back = without_blocks(tmp_path / "whole", tmp_path / "back", [0, 1], anatomy.blocks_path)
    assert load_model(str(back), config, blocks=[2, 3]) is not None


def test_reads_are_counted_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that is taken out of the file is noted by name."""
    import safetensors
    import transformers.modeling_utils

    build("llama").save_pretrained(tmp_path / "whole")
    config = load_model_config(str(tmp_path / "whole"))
    read: list[str] = []
    real = safetensors.safe_open

    class Noting:
        def __init__(self, *arguments: object, **options: object) -> None:
            self.file = real(*arguments, **options)  # type: ignore[arg-type]

        def __enter__(self) -> Noting:
            self.file.__enter__()
            return self

        def __exit__(self, *problem: object) -> None:
            self.file.__exit__(*problem)

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.file.get_tensor(name)

        def get_slice(self, name: str) -> object:
            inner = self.file.get_slice(name)

            class Slice:
                def __getitem__(self, index: object) -> torch.Tensor:
                    read.append(name)
                    return inner[index]

                def __getattr__(self, attribute: str) -> object:
                    return getattr(inner, attribute)

            return Slice()

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", Noting)
    load_model(str(tmp_path / "whole"), config, blocks=[0, 1], needs_exit=False)
    assert any("layers.0." in name for name in read), "the spy saw nothing"
    assert not [name for name in read if "layers.2." in name or "layers.3." in name or "lm_head" in name]


@pytest.mark.parametrize("u_shape", [False, True])
def test_partly_loaded_sides_train_like_the_whole_model(u_shape: bool, tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "whole")
    config = load_model_config(str(tmp_path / "whole"))
    anatomy = inspect_family(config, "llama")
    whole = federation("llama", clients=1)
    plan = Plan(0, 2, 3, 3, u_shape)
    round_plan = RoundPlan(1, (plan,))
    start = whole.layout.initial_row(1)

    def side(blocks: list[int], needs_exit: bool) -> Federation:
        split = SplitModel(load_model(str(tmp_path / "whole"), config, blocks=blocks, needs_exit=needs_exit), anatomy, owned=blocks)
        return Federation(split, whole.layout, whole.clients, whole.orders, whole.settings, VOCABULARY, whole.device, whole.start)

    def round_of(client_side: Federation, server_side: Federation) -> torch.Tensor:
        columns = Ownership(plan, BLOCKS).client_columns(whole.layout)
        server = Server(server_side, round_plan, 0, same_start(start), {}, True)
        opening = round_start_frame(plan, 1, 0, whole.settings, take(start, columns)).encode()
        InProcess().carry({0: Client(client_side, 0, ClientState()).round(opening)}, server.handle, lambda *seen: None)
        return server.bank.values[0].clone()

    expected = round_of(whole, whole)
    found = round_of(side([0, 1], u_shape), side([2, 3], not u_shape))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert isinstance(whole.layout, Layout)
