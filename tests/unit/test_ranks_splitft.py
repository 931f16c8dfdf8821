"""Rank policy `splitft`: which block is lowered, and the byte counts of the paper."""

from __future__ import annotations

import pytest

from splitft.catalog import build
from splitft.errors import CheckpointError, ConfigError
from splitft.lora import Layout
from splitft.ranks.splitft import CutRank
from splitft.types import Key

from .cost_shapes import DEVICE, cost_model

# GPT-2 small with LoRA on every c_attn and c_proj, as in the paper's tables.
GPT2 = Layout.of(
    {
        Key(block, module): widths
        for block in range(12)
        for module, widths in {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_proj": (3072, 768)}.items()
    },
    16,
    2.0,
)
SMALL = Layout.of({Key(block, "attn.c_attn"): (32, 96) for block in range(6)}, 4, 1.0)


def ranks_of(policy: CutRank, cut: int, layout: Layout = SMALL, **fields: object) -> tuple[int, ...]:
    state = policy.init(layout, [DEVICE], [cost_model(**fields)])
    ranks, after = policy.plan(1, {7: cut}, [], layout, state)
    assert after == state
    assert set(ranks) == {7}
    return ranks[7]


def test_the_block_at_the_cut_is_lowered() -> None:
    assert ranks_of(CutRank(1), 1) == (1, 4, 4, 4, 4, 4)
    assert ranks_of(CutRank(2), 3) == (4, 4, 2, 4, 4, 4)


def test_both_sides_lower_the_servers_first_block_too() -> None:
    assert ranks_of(CutRank(1, "both"), 1) == (1, 1, 4, 4, 4, 4)
    assert ranks_of(CutRank(2, "both"), 3) == (4, 4, 2, 2, 4, 4)


def test_a_server_without_blocks_has_none_to_lower() -> None:
    assert ranks_of(CutRank(1, "both"), 6) == (4, 4, 4, 4, 4, 1)
    # Behind the server's last block stands the client's tail, which is no neighbour of the cut.
    fields = {"exit_on_client": True, "tail_blocks": 2}
    assert ranks_of(CutRank(1, "both"), 4, **fields) == (4, 4, 4, 1, 4, 4)
    assert ranks_of(CutRank(1, "both"), 3, **fields) == (4, 4, 1, 1, 4, 4)


@pytest.mark.parametrize("cut", [2, 4, 6, 8, 10])
@pytest.mark.parametrize("rank_at_cut", [1, 2, 4, 8, 16])
def test_the_clients_parameters_are_those_behind_the_papers_tables(cut: int, rank_at_cut: int) -> None:
    policy = CutRank(rank_at_cut)
    ranks = policy.plan(1, {0: cut}, [], GPT2, policy.init(GPT2, [DEVICE], [cost_model()]))[0][0]
    own = [(entry, rank) for entry, rank in zip(GPT2.entries, ranks, strict=True) if entry.key.block < cut]
    assert sum(rank * (entry.inputs + entry.outputs) for entry, rank in own) == 8448 * (16 * (cut - 1) + rank_at_cut)


def test_what_it_saves_is_less_than_half_a_per_cent() -> None:
    """The figure the reference page gives, from 1143 steps of 4 x 128 tokens and 57 uploads at cut 2."""

    def megabytes(rank_at_cut: int) -> float:
        return (1143 * (2 * 4 * 128 * 768 * 4 + 1900) + 57 * (8448 * 4 * (16 + rank_at_cut) + 2000 * 2)) / 2**20

    assert megabytes(16) - megabytes(8) == pytest.approx(14.7, abs=0.05)
    assert (megabytes(16) - megabytes(8)) / megabytes(16) == pytest.approx(0.0042, abs=5e-5)
    text = " ".join((CutRank.__doc__ or "").split())
    assert "saves 14.7 of 3490.1 MB, 0.42 %" in text


@pytest.mark.parametrize("rank", [-1, True, 2.0, "8"])
def test_a_rank_must_be_a_positive_whole_number(rank: object) -> None:
    with pytest.raises(
        ConfigError, match=r"ranks\.rank_at_cut is .*; allowed are whole numbers from 0 \(half of lora\.rank\) to lora\.rank"
    ):
        build("ranks", "splitft", {"rank_at_cut": rank})


def test_a_rank_above_the_layouts_is_refused_before_the_run() -> None:
    with pytest.raises(ConfigError, match=r"rank_at_cut is 5; allowed is 1\.\.4") as caught:
        CutRank(5).init(SMALL, [DEVICE], [cost_model()])
    assert "set lora.rank to 5" in caught.value.remedy


def test_an_unknown_side_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ranks\.side is 'server'; allowed: client, both"):
        CutRank(side="server")


def test_a_state_of_another_policy_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no server_end"):
        CutRank().plan(1, {0: 1}, [], SMALL, {})


@pytest.mark.parametrize(("full", "half"), [(1, 1), (2, 1), (8, 4), (16, 8)])
def test_without_a_rank_at_the_cut_it_is_half(full: int, half: int) -> None:
    layout = Layout.of({Key(block, "q"): (8, 8) for block in range(3)}, full, 1.0)
    policy = CutRank()
    state = policy.init(layout, [DEVICE], [cost_model()])
    chosen, _ = policy.plan(1, {0: 2}, [], layout, state)
    assert chosen[0] == (full, half, full)
