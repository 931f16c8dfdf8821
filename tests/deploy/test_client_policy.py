"""A client's own policy: read strictly, and no order of a server gets past it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from splitft.compress.base import Codec
from splitft.compress.cast import Cast
from splitft.compress.entropy import Entropy
from splitft.compress.error_bounded import ErrorBounded
from splitft.compress.identity import Identity
from splitft.compress.noise import Noise
from splitft.compress.projection import Projection
from splitft.compress.quantize import Quantize
from splitft.config import RunConfig, parse_config
from splitft.deploy.policy import (
    ClientPolicy,
    check_adapters,
    check_gradient,
    check_noise,
    check_round,
    check_score,
    check_welcome,
    load_policy,
    parse_policy,
)
from splitft.errors import ConfigError, PolicyError
from splitft.messages import RoundStart, ScoreStart
from splitft.rng import torch_stream

MODEL, OTHER = "a" * 64, "b" * 64
STRICT = {
    "minimum_cut": 2,
    "maximum_cut": 4,
    "labels": "client",
    "uplink_codecs": ["cast", "quantize", "entropy"],
    "adapter_codecs": ["identity"],
    "maximum_rounds": 100,
    "maximum_local_steps": 20,
    "maximum_step_rows": 64,
    "base_model": MODEL,
    "server_fingerprint": ":".join(["AB"] * 32),
    "gradient_norm_limit": 100.0,
    "adapter_norm_limit": 100.0,
}
FINE: dict[str, Any] = {"rounds": 100, "split": {"labels": "client", "minimum_cut": 2, "maximum_cut": 3}, "train": {"local_steps": 20}}


def config(**changes: Any) -> RunConfig:
    merged = {key: {**FINE.get(key, {}), **value} if isinstance(value, dict) else value for key, value in changes.items()}
    return parse_config({**FINE, **merged})


def order(**changes: Any) -> RoundStart:
    start = RoundStart(
        round=100,
        client=0,
        cut=2,
        tail_blocks=0,
        exit_on_client=True,
        local_steps=20,
        gradient_accumulation=4,
        batch_size=16,
        rank=8,
        clip_norm=1.0,
        first_step=0,
        rates=[1e-3],
    )
    return msgspec.structs.replace(start, **changes)


def test_what_the_policy_allows_passes() -> None:
    policy = parse_policy(STRICT)
    check_welcome(policy, config(), MODEL, "ab" * 32)
    check_round(policy, order())
    check_round(policy, order(cut=4))
    check_gradient(policy, torch.full((3, 5, 4), 50.0))  # each token's norm is exactly 100
    check_adapters(policy, torch.full((4,), 50.0))
    check_gradient(policy, torch.zeros(0, 4))
    check_welcome(ClientPolicy(), RunConfig(), OTHER)
    check_round(ClientPolicy(), order(cut=1, exit_on_client=False, local_steps=1))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("maximum_rounds", {"rounds": 10**6}),
        ("labels", {"split": {"labels": "server"}}),
        ("minimum_cut", {"split": {"minimum_cut": 1, "maximum_cut": 1}}),
        ("maximum_cut", {"split": {"minimum_cut": 5, "maximum_cut": 0}}),
        ("maximum_local_steps", {"train": {"local_steps": 21}}),
        ("maximum_step_rows", {"train": {"batch_size": 13, "gradient_accumulation": 5}}),
        ("uplink_codecs", {"uplink": "identity"}),
        ("uplink_codecs", {"uplink": {"name": "entropy", "inner": "identity"}}),
        ("uplink_codecs", {"uplink": {"name": "entropy", "inner": {"name": "entropy", "inner": {"name": "topk", "share": 0.1}}}}),
        ("uplink_codecs", {"downlink": "identity"}),  # the codec of the exit's gradients, which leave
        ("uplink_codecs", {"exit_uplink": "identity"}),
        ("adapter_codecs", {"adapter_uplink": "cast"}),
        ("adapter_codecs", {"adapter_downlink": "cast"}),
    ],
)
def test_a_run_beyond_the_policy_is_refused_at_the_door(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=rf"\({field}\).* change {field} in the policy file"):
        check_welcome(parse_policy(STRICT), config(**changes), MODEL, "ab" * 32)


def test_what_only_the_downlink_has_does_not_count_on_a_plain_cut() -> None:
    policy = parse_policy({"uplink_codecs": ["cast"]})
    check_welcome(policy, config(split={"labels": "server"}, downlink="identity", exit_uplink="identity"), MODEL)


def test_another_model_and_another_server_are_refused() -> None:
    with pytest.raises(PolicyError, match=rf"{OTHER}.*only {MODEL} \(base_model\)"):
        check_welcome(parse_policy(STRICT), config(), OTHER, "ab" * 32)
    for shown in ("cd" * 32, "", "ab" * 31):
        with pytest.raises(PolicyError, match="server_fingerprint"):
            check_welcome(parse_policy(STRICT), config(), MODEL, shown)


@pytest.mark.parametrize(
    ("codec", "rms"),
    [
        (Identity(), 0.0),
        (Entropy(inner=Quantize()), 0.0),
        (Noise(inner=Cast("bfloat16"), multiple=0.4), 0.4),
        (Noise(inner=Projection(inner=Quantize(), dimensions=4), multiple=0.4), 0.4),
        (Entropy(inner=Noise(inner=ErrorBounded(), multiple=0.4)), 0.4),
        (Entropy(inner=Noise(inner=Quantize(), clip=3.0, multiple=0.05)), 0.05 * 64**0.5),
    ],
)
def test_the_floor_of_noise_is_held_against_the_whole_stack(codec: Codec, rms: float) -> None:
    """Whatever stands around or inside, in root mean squares of a row of 64 channels; in a U-shape the returned gradients count too."""
    labels = {"labels": "client"}
    check_noise(parse_policy({"noise_floor": rms, **labels}), {"uplink": codec}, 64)
    for leaving in ({"uplink": codec}, {"uplink": Noise(inner=Identity(), multiple=9.0), "exit_uplink": codec}):
        with pytest.raises(PolicyError, match=rf"noise of {rms:g} rms on what leaves \({list(leaving)[-1]}\).*\(noise_floor\)"):
            check_noise(parse_policy({"noise_floor": rms + 0.01, **labels}), leaving, 64)
    check_noise(ClientPolicy(), {"uplink": codec}, 64)


def test_the_real_noise_is_what_the_floor_counts() -> None:
    """Independently: what a stack adds, measured over rows of one length, without a look at its fields."""
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    for codec in (Noise(inner=Identity(), multiple=0.4), Noise(inner=Identity(), clip=8.0, multiple=0.05)):
        long = rows / rows.norm(dim=1, keepdim=True) * 8.0  # at the clip
        state = codec.init()
        packet, _ = codec.encode(long, state, torch_stream(2, "policy-test"))
        arrived, _ = codec.decode(packet, codec.init())
        measured = float((arrived - long).square().mean().sqrt() / long.square().mean().sqrt())
        check_noise(parse_policy({"noise_floor": 0.97 * measured, "labels": "client"}), {"uplink": codec}, 64)
        with pytest.raises(PolicyError, match="noise_floor"):
            check_noise(parse_policy({"noise_floor": 1.03 * measured, "labels": "client"}), {"uplink": codec}, 64)


def test_a_floor_of_noise_leaves_no_way_around() -> None:
    """Labels would be the text, and measured rows leave without codecs."""
    with pytest.raises(ConfigError, match='needs labels = "client"'):
        parse_policy({"noise_floor": 0.1})
    start = ScoreStart(round=0, client=0, cut=2, tail_blocks=0, exit_on_client=True, batch_size=2, max_rows=0)
    check_score(parse_policy({"labels": "client"}), start)
    with pytest.raises(PolicyError, match="held-out rows, which are measured without codecs"):
        check_score(parse_policy({"noise_floor": 0.1, "labels": "client"}), start)


INSISTS = {"secure_aggregation": "required", "least_owners": 5, "least_threshold": 0.75, "peers": ["clinic"], "least_bucket_tokens": 16}
HIDDEN = {"enabled": True, "minimum": 5, "threshold": 0.75}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("secure_aggregation", {"secure_aggregation": {**HIDDEN, "enabled": False}}),
        ("least_owners", {"secure_aggregation": {**HIDDEN, "minimum": 4}}),
        ("least_threshold", {"secure_aggregation": {**HIDDEN, "threshold": 0.74}}),
        ("least_threshold", {"secure_aggregation": {**HIDDEN, "threshold": 0.0}}),  # two thirds
        ("least_bucket_tokens", {"tokens": {"bucket_tokens": 8}}),
        ("least_bucket_tokens", {"tokens": {"bucket_tokens": 0}}),
    ],
)
def test_a_run_that_hides_less_than_the_policy_wants_is_refused_at_the_door(field: str, changes: dict[str, Any]) -> None:
    policy, fine = parse_policy(INSISTS), {"secure_aggregation": HIDDEN, "tokens": {"bucket_tokens": 16}}
    check_welcome(policy, config(**fine), MODEL)
    with pytest.raises(PolicyError, match=rf"\({field}\).* change {field} in the policy file"):
        check_welcome(policy, config(**{**fine, **changes}), MODEL)
    check_welcome(ClientPolicy(), config(**{**fine, **changes}), MODEL)


def test_a_round_that_asks_for_adapters_in_the_clear_is_refused_whatever_was_announced() -> None:
    policy = parse_policy({"secure_aggregation": "required"})
    check_round(policy, order(upload=False))
    with pytest.raises(PolicyError, match=r"adapters in the clear at the end of a round.*\(secure_aggregation\)"):
        check_round(policy, order(upload=True))
    check_round(ClientPolicy(), order(upload=True))


def test_how_a_sum_is_hidden_means_nothing_where_it_need_not_be() -> None:
    for name in ("least_owners", "least_threshold", "peers"):
        with pytest.raises(ConfigError, match=f'{name}: needs secure_aggregation = "required"'):
            parse_policy({name: INSISTS[name]})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("minimum_cut", {"cut": 0}),
        ("minimum_cut", {"cut": 1}),
        ("minimum_cut", {"cut": -5}),
        ("maximum_cut", {"cut": 5}),
        ("labels", {"exit_on_client": False}),
        ("maximum_rounds", {"round": 101}),
        ("maximum_rounds", {"round": 10**6}),
        ("maximum_local_steps", {"local_steps": 21}),
        ("maximum_step_rows", {"gradient_accumulation": 5}),
        ("maximum_step_rows", {"batch_size": 10**9}),
    ],
)
def test_an_order_beyond_the_policy_is_refused_whatever_was_announced(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=rf"\({field}\)"):
        check_round(parse_policy(STRICT), order(**changes))


def test_without_a_policy_file_nonsense_is_refused_all_the_same() -> None:
    policy = load_policy(None)
    with pytest.raises(PolicyError, match="minimum_cut"):
        check_round(policy, order(cut=0))
    with pytest.raises(PolicyError, match="maximum_rounds"):
        check_welcome(policy, config(rounds=10**6), MODEL)
    with pytest.raises(PolicyError, match="gradient_norm_limit"):
        check_gradient(policy, torch.full((2, 3, 4), 1e9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_absurd_token_is_enough(dtype: torch.dtype) -> None:
    policy = parse_policy(STRICT)
    gradient = torch.full((3, 5, 4), 40.0, dtype=dtype)
    check_gradient(policy, gradient)
    for bad in (1e4, float("nan"), float("inf"), -float("inf")):
        spoilt = gradient.clone()
        spoilt[1, 2, 3] = bad
        with pytest.raises(PolicyError, match="gradient_norm_limit"):
            check_gradient(policy, spoilt)
        with pytest.raises(PolicyError, match="adapter_norm_limit"):
            check_adapters(policy, spoilt.flatten())
    with pytest.raises(PolicyError, match="norm 155"):  # no value is large, all together are
        check_adapters(policy, torch.full((60,), 20.0, dtype=dtype))


def test_a_limit_of_zero_takes_any_finite_value() -> None:
    policy = parse_policy({"gradient_norm_limit": 0.0, "adapter_norm_limit": 0.0})
    check_gradient(policy, torch.full((2, 4), 3e38))  # its norm is beyond float32
    check_adapters(policy, torch.full((4,), 3e38))
    with pytest.raises(PolicyError, match="not finite"):
        check_adapters(policy, torch.tensor([1.0, float("nan")]))


def test_the_file_is_read_strictly_and_all_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text('minimum_cut = 2\nlabels = "client"\nuplink_codecs = ["cast"]\nbase_model = "' + MODEL + '"\n')
    policy = load_policy(path)
    assert (policy.minimum_cut, policy.labels, policy.uplink_codecs, policy.base_model) == (2, "client", ["cast"], MODEL)
    path.write_text(
        'minimum_cutt = 2\nlabels = "mine"\nmaximum_rounds = "10"\nuplink_codecs = "cast"\nbase_model = "x"\n'
        'server_fingerprint = "AB"\nnoise_floor = -1.0\ngradient_norm_limit = nan\nmaximum_cut = 1.5\n'
    )
    with pytest.raises(ConfigError) as caught:
        load_policy(path)
    text = str(caught.value)
    assert len(caught.value.problems) == 9
    for name in (
        "minimum_cutt",
        "minimum_cut",
        "labels",
        "maximum_rounds",
        "uplink_codecs",
        "base_model",
        "server_fingerprint",
        "noise_floor",
    ):
        assert name in text
    assert "64 hexadecimal digits" in text
    assert "did you mean minimum_cut" in text
    with pytest.raises(ConfigError, match="at least minimum_cut"):
        parse_policy({"minimum_cut": 3, "maximum_cut": 2})
    with pytest.raises(ConfigError, match="Cannot read"):
        load_policy(tmp_path / "none.toml")
