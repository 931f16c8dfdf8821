"""Bottlenecks apart from training: where their matrices stand, what they begin as, what they are refused with, what is written of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from splitft.apps.assemble import assemble, build_components
from splitft.apps.cite import catalogue, references_of
from splitft.apps.session import FederatedRun
from splitft.bottleneck import begin, clipped, pair_of, principal
from splitft.compress.noise import noise_in
from splitft.engine.exchange import Ownership, positions, without
from splitft.errors import AdapterError, ConfigError
from splitft.lora import AdapterBank, Layout
from splitft.types import Key, Plan

from ..tiny_run import tiny_config

WIDTH, BLOCKS, CHANNELS = 6, 3, 2


def layout() -> Layout:
    widths = {Key(block, name): (WIDTH, WIDTH) for block in range(BLOCKS) for name in ("a", "b")}
    pairs = [pair_of("cut", cut, WIDTH, CHANNELS) for cut in (1, 2, 3)] + [pair_of("exit", 3, WIDTH, CHANNELS)]
    return Layout.of(widths, 2, 1.0).beside([one for pair in pairs for one in (pair.encoder, pair.decoder)])


def test_a_row_is_filled_without_gaps_and_every_matrix_stands_with_its_block() -> None:
    made = layout()
    spans = sorted([(entry.start, entry.end) for entry in made.entries] + [(one.start, one.end) for one in made.matrices])
    assert spans[0][0] == 0
    assert all(one[1] == other[0] for one, other in pairwise(spans))
    assert spans[-1][1] == made.parameters
    for one in made.matrices:
        inside = made.columns(one.block, one.block + 1)
        assert inside.start <= one.start < one.end <= inside.stop, one.name
    plain = Layout(tuple(Layout.of({entry.key: (WIDTH, WIDTH) for entry in made.entries}, 2, 1.0).entries))
    assert plain.columns(0, 9).stop == plain.parameters
    assert made.columns(BLOCKS, BLOCKS + 1).stop == made.parameters, "what stands behind the last block"
    assert len(made.factors(torch.zeros(made.parameters))) == len(plain.entries), "no adapter of PEFT's"


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_client_and_its_session_have_their_own_pair_and_no_other(cut: int) -> None:
    made = layout()
    plan = Ownership(Plan(0, cut, 1, 2), BLOCKS)
    mine = set(positions(plan.client_columns(made)).tolist())
    theirs = set(range(plan.server_columns(made).start, plan.server_columns(made).stop))
    for one in made.matrices:
        span = set(range(one.start, one.end))
        own = (one.place, one.boundary) == ("cut", cut)
        assert (span <= mine) == (own and one.encodes), one.name
        assert not (span & mine) or span <= mine
        if own and not one.encodes:
            assert span <= theirs
    u_shape = Ownership(Plan(0, 2, 1, 2, exit_on_client=True), BLOCKS)
    held = set(positions(u_shape.client_columns(made)).tolist())
    names = {one.name for one in made.matrices if set(range(one.start, one.end)) <= held}
    assert names == {"cut_2.encoder", "exit_3.decoder"}
    whole = Ownership(Plan(0, 3, 1, 2, exit_on_client=True), BLOCKS)
    assert len(whole.unused(made)) == len(made.matrices), "nothing crosses"


def test_ranges_taken_out_of_ranges() -> None:
    ranges = [slice(0, 10), slice(20, 30)]
    assert without(ranges, [slice(0, 2), slice(5, 6), slice(8, 25), slice(40, 50)]) == [slice(2, 5), slice(6, 8), slice(25, 30)]
    assert without(ranges, []) == ranges


def test_a_pair_begins_as_the_best_linear_bottleneck() -> None:
    draw = torch.Generator().manual_seed(0)
    states = (
        5 + torch.randn(400, 3, generator=draw) @ torch.randn(3, WIDTH, generator=draw) + 0.01 * torch.randn(400, WIDTH, generator=draw)
    )
    mean, axes = principal([states[:150], states[150:]], 3)
    torch.testing.assert_close(axes @ axes.T, torch.eye(3, dtype=torch.float64))
    errors = {}
    for channels in (3, 2):
        pair = pair_of("cut", 1, WIDTH, channels, scale=0.5)
        made = Layout.of({Key(0, "a"): (WIDTH, WIDTH)}, 2, 1.0).beside([pair.encoder, pair.decoder])
        row = torch.zeros(made.parameters)
        pair = made.pair("cut", 1)
        begin(pair, row, mean, axes[:channels])
        one = torch.ones(400, 1)
        codes = torch.cat([states, one], 1) @ (0.5 * pair.encoder.of(row)).T
        back = torch.cat([codes, one], 1) @ (0.5 * pair.decoder.of(row)).T
        errors[channels] = float((back - states).square().sum())
        best = torch.linalg.svdvals((states - mean.float()).double())[channels:].square().sum()
        assert errors[channels] == pytest.approx(float(best), rel=1e-3)
        torch.testing.assert_close(codes.mean(0), torch.zeros(channels), atol=1e-4, rtol=0)
    assert errors[3] < 0.01 * errors[2]


def test_clipping_shortens_and_lets_the_gradient_through() -> None:
    codes = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    found = clipped(codes, 1.0)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8], [0.3, 0.4]], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda given: clipped(given, 1.0), (codes,))
    assert clipped(codes, 0.0) is codes


def test_a_frozen_pair_gets_no_gradient_and_no_decay() -> None:
    pair = pair_of("cut", 1, WIDTH, CHANNELS, trained=False)
    made = Layout.of({Key(0, "a"): (WIDTH, WIDTH)}, 2, 1.0).beside([pair.encoder, pair.decoder])
    bank = AdapterBank(made, 1)
    assert bank.trained is not None
    assert int((bank.trained == 0).sum()) == pair.encoder.size + pair.decoder.size
    assert not any(leaf.requires_grad for leaf in bank.matrices.values())
    with pytest.raises(AdapterError, match="no bottleneck"):
        made.pair("cut", 2)


CLASHES: dict[str, tuple[dict[str, Any], str]] = {
    "products": ({"aggregator": {"name": "product"}}, "value by value"),
    "half the factors": ({"aggregator": {"name": "freeze_a"}}, "value by value"),
    "masks": ({"secure_aggregation": {"enabled": True}}, "secure_aggregation.limit"),
    "one server": ({"split": {"server": "shared"}}, "per_client"),
    "asynchronous": ({"clients": {"buffer": 2}}, "clients.buffer = 0"),
    "drift": ({"synchronisation": {"name": "drift"}}, "every_round"),
    "changes down": ({"adapter_uplink": {"name": "quantize"}}, "adapter_downlink"),
    "whole": ({"policy": {"name": "whole"}, "split": {"labels": "client"}}, "nothing crosses"),
    "moments that move": ({"policy": {"name": "resource"}, "train": {"moments": "keep"}}, "stays at its cut"),
    "a controller": ({"controller": {"name": "energy"}, "uplink": {"name": "error_bounded"}}, "probes the codecs"),
}


@pytest.mark.parametrize("clash", CLASHES)
def test_what_it_does_not_go_with_is_refused_with_the_reason(tmp_path: Path, clash: str) -> None:
    changes, reason = CLASHES[clash]
    config = tiny_config(tmp_path, bottleneck={"channels": 4}, **changes)
    with pytest.raises(ConfigError) as refused:
        build_components(config)
    assert any("bottleneck.channels" in one and reason in one for one in refused.value.problems), refused.value.problems


def test_fields_without_channels_wrong_cuts_and_too_many_channels_are_refused(tmp_path: Path) -> None:
    for name, value in (("noise", 1.0), ("clip", 1.0), ("cuts", [1])):
        with pytest.raises(ConfigError, match=f"bottleneck.{name}"):
            tiny_config(tmp_path, bottleneck={name: value})
    with pytest.raises(ConfigError, match="list of cuts"):
        tiny_config(tmp_path, bottleneck={"channels": 4, "cuts": [0]})
    with pytest.raises(ConfigError, match="states of 32 channels"):
        assemble(tiny_config(tmp_path, bottleneck={"channels": 33}))
    with pytest.raises(ConfigError, match="allows 1 to 4"):
        assemble(tiny_config(tmp_path, bottleneck={"channels": 3, "cuts": [2, 5]}))
    with pytest.raises(ConfigError, match="both put noise"):
        build_components(tiny_config(tmp_path, bottleneck={"channels": 3, "noise": 1.0}, uplink={"name": "noise"}))


@pytest.mark.parametrize("clip", [0.0, 3.0])
def test_noise_is_counted_in_root_mean_squares_of_what_leaves(tmp_path: Path, clip: float) -> None:
    config = tiny_config(tmp_path, bottleneck={"channels": 9, "noise": 0.7, "clip": clip})
    built = build_components(config)
    noise = noise_in(built.uplink)
    assert noise is not None
    assert noise.in_units_of_rms(9) == pytest.approx(0.7)
    assert noise.clip == clip
    assert noise_in(built.exit_downlink) is None, "what the server sends has none"
    assert "2311.14030" in references_of(config, catalogue())


def test_the_beginning_follows_from_the_base_model_and_costs_are_those_counted(tmp_path: Path) -> None:
    found = []
    for seed, cuts in ((1, [1, 2, 3]), (2, [2, 3, 3])):
        built = assemble(tiny_config(tmp_path, seed=seed, bottleneck={"channels": 5}, policy={"name": "fixed", "cuts": cuts}))
        made = built.federation.layout
        assert {one.boundary for one in made.matrices} == set(cuts)
        found.append(made.pair("cut", 3).encoder.of(built.start).clone())
        plan = built.costs[0].plan(2)
        size = Ownership(plan, 4).client_size(made)
        assert built.costs[0].cost(plan).adapters_up_bytes == 4 * size
    assert torch.equal(*found)


def test_a_run_leaves_its_pairs_and_says_what_it_is_worth_through_them(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, bottleneck={"channels": 32, "learning_rate": 0.0}, train={"local_steps": 1}, rounds=1)
    run = FederatedRun(config)
    list(run.rounds())
    folder = run.finish()
    layout, row = run.assembly.federation.layout, run.state.adapters
    run.close()
    tensors = load_file(folder / "bottleneck.safetensors")
    assert set(tensors) == {one.name for one in layout.matrices}
    for one in layout.matrices:
        torch.testing.assert_close(tensors[one.name], one.scale * one.of(row))
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    event = next(one for one in events if one["event"] == "bottleneck")
    last = [one for one in events if one["event"] == "evaluation"][-1]
    assert event["exported"]["loss"] == pytest.approx(last["global"]["loss"])
    assert [one["cut"] for one in event["through"]] == [1, 2, 3]
    for one in event["through"]:  # as many channels as the model has: the same model
        assert one["loss"] == pytest.approx(event["exported"]["loss"], rel=1e-4)
    assert any(one["event"] == "warning" and "the exported adapter has no bottleneck" in one["text"] for one in events)
    assert not any("bottleneck" in name or "coder" in name for name in load_file(folder / "adapter" / "adapter_model.safetensors"))
