"""Fixed point, shares, masks and cohorts, each against what it must be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.errors import AdapterError, ConfigError, ProtocolError
from splitft.rng import fresh_bytes
from splitft.secure import masks, shamir
from splitft.secure.cohorts import Cohort, cohorts_of, levelled, openable, owned_by, require_cuts
from splitft.secure.field import FixedPoint, from_bytes, to_bytes
from splitft.secure.protocol import secure_threshold

# -- fixed point -------------------------------------------------------------------------------------------------------------------------


def test_the_largest_sum_does_not_wrap_and_one_more_bit_is_refused() -> None:
    number = FixedPoint.fitting(64, 1 << 20, 50)
    extreme = np.array([64.0, -64.0], dtype=np.float32)
    total = sum((number.encode(extreme, 1 << 20) for _ in range(50)), np.zeros(2, dtype=np.uint64))
    assert number.decode(total).tolist() == [64.0 * 50 * 2**20, -64.0 * 50 * 2**20]
    with pytest.raises(ConfigError, match="overflow 63 bits"):
        FixedPoint(number.fraction_bits + 1, 64, 1 << 20, 50)


@given(st.integers(1, 1 << 10), st.integers(1, 1 << 22), st.integers(1, 1000))
def test_the_step_chosen_never_overflows_and_is_the_finest(limit: int, weight: int, clients: int) -> None:
    number = FixedPoint.fitting(limit, weight, clients)
    assert (limit * weight * clients) << number.fraction_bits < 1 << 63
    assert number.fraction_bits == 40 or (limit * weight * clients) << (number.fraction_bits + 2) >= 1 << 63


def test_a_step_that_would_be_coarse_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needed is 2\^-16"):
        FixedPoint.fitting(1 << 20, 1 << 20, 1 << 10)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 8.000001, -9.0])
def test_values_beyond_the_limit_are_refused(value: float) -> None:
    with pytest.raises(AdapterError, match="secure aggregation sums values up to 8"):
        FixedPoint.fitting(8, 10, 3).encode(np.array([0.0, value], dtype=np.float32), 1)


@pytest.mark.parametrize("weight", [0, -1, 11])
def test_weights_beyond_the_agreed_ones_are_refused(weight: int) -> None:
    with pytest.raises(AdapterError, match="allowed are 1 to 10"):
        FixedPoint.fitting(8, 10, 3).encode(np.zeros(1, dtype=np.float32), weight)


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20), st.integers(1, 10))
def test_encoding_rounds_to_the_nearest_step(values: list[float], weight: int) -> None:
    number = FixedPoint(20, 8, 10, 3)
    row = np.array(values, dtype=np.float32)
    words = from_bytes(to_bytes(number.encode(row, weight)))
    assert words.view(np.int64).tolist() == [weight * round(float(value) * 2**20) for value in row]
    assert np.abs(number.decode(words) - weight * row.astype(np.float64)).max() <= weight * number.step / 2


# -- shares ------------------------------------------------------------------------------------------------------------------------------


def is_prime(number: int) -> bool:
    """Miller and Rabin, bases enough that a composite passes with a chance below 2^-80."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        value = pow(base, odd, number)
        if value in (1, number - 1):
            continue
        for _ in range(twos - 1):
            value = value * value % number
            if value == number - 1:
                break
        else:
            return False
    return True


def test_the_field_is_a_field() -> None:
    assert is_prime(shamir.PRIME)
    assert not any(is_prime((1 << 256) + k) for k in range(1, 297))


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 6), st.integers(0, 4), st.randoms())
def test_any_threshold_of_shares_gives_the_secret(secret: bytes, threshold: int, more: int, draw: object) -> None:
    points = draw.sample(range(1, 2000), threshold + more)  # type: ignore[attr-defined]
    shares = shamir.split(secret, threshold, points)
    for chosen in itertools.islice(itertools.combinations(points, threshold), 20):
        assert shamir.combine({point: shares[point] for point in chosen}, threshold) == secret


def test_one_share_less_fits_every_secret() -> None:
    """Whatever secret one guesses, there is a share that completes what one has to it: fewer shares say nothing."""
    shares = shamir.split(fresh_bytes(32), 3, [1, 2, 3])
    for guess in (bytes(32), b"\xff" * 32, fresh_bytes(32)):
        # The only parabola through two shares and the guess at 0, at 3 (finite differences of second order are constant).
        first, second = (int.from_bytes(shares[point], "little") for point in (1, 2))
        third = (int.from_bytes(guess, "little") - 3 * first + 3 * second) % shamir.PRIME
        assert shamir.combine({1: shares[1], 2: shares[2], 3: third.to_bytes(33, "little")}, 3) == guess


def test_shares_are_fresh_and_spread_over_the_field() -> None:
    secret = bytes(32)
    drawn = [shamir.split(secret, 2, [1, 2])[1] for _ in range(200)]
    assert len(set(drawn)) == 200
    assert 60 < sum(int.from_bytes(share, "little") * 2 > shamir.PRIME for share in drawn) < 140


@pytest.mark.parametrize("share", [b"", bytes(32), bytes(34), b"\xff" * 33, shamir.PRIME.to_bytes(33, "little")])
def test_malformed_shares_are_refused_by_name(share: bytes) -> None:
    good = shamir.split(bytes(32), 2, [1, 2])
    with pytest.raises(ProtocolError, match="the share at point 2 is no share of a secret"):
        shamir.combine({1: good[1], 2: share}, 2)


def test_too_few_shares_are_refused() -> None:
    with pytest.raises(ProtocolError, match="1 shares of a secret that needs 2"):
        shamir.combine({1: shamir.split(bytes(32), 2, [1, 2])[1]}, 2)
    with pytest.raises(ProtocolError, match="points are 1 or more"):
        shamir.combine({0: bytes(33), 1: bytes(33)}, 2)


# -- masks -------------------------------------------------------------------------------------------------------------------------------


def test_both_sides_agree_and_a_third_does_not() -> None:
    one, two, three = masks.new_pair(), masks.new_pair(), masks.new_pair()
    mine = masks.agree(one, two.public, b"c" * 32, b"pairwise", "two")
    assert mine == masks.agree(two, one.public, b"c" * 32, b"pairwise", "one")
    others = [
        masks.agree(three, two.public, b"c" * 32, b"pairwise", ""),
        masks.agree(one, two.public, b"d" * 32, b"pairwise", ""),
        masks.agree(one, two.public, b"c" * 32, b"channel", ""),
    ]
    assert len({mine, *others}) == 4


# Points of small order on Curve25519: agreeing with them gives the same secret to everybody.
SMALL_ORDER = [bytes(32), b"\x01" + bytes(31), bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f")]


@pytest.mark.parametrize("public", [*SMALL_ORDER, b"", bytes(31), bytes(33)])
def test_malformed_points_are_refused_by_name(public: bytes) -> None:
    with pytest.raises(ProtocolError, match="the public key of client 7 is no point"):
        masks.agree(masks.new_pair(), public, bytes(32), b"pairwise", "client 7")


def test_a_pair_has_its_library_s_public_half() -> None:
    pair = masks.new_pair()
    assert X25519PrivateKey.from_private_bytes(pair.private).public_key().public_bytes_raw() == pair.public


def test_a_mask_is_taken_off_again_and_differs_by_seed_cohort_and_context() -> None:
    words = np.arange(masks.PIECE_WORDS + 5, dtype=np.uint64)
    seed = fresh_bytes(32)
    masked = words.copy()
    masks.add_mask(masked, seed, bytes(32), 0)
    assert (masked != words).mean() > 0.999
    assert np.array_equal(masked - words, masks.mask(seed, bytes(32), 0, len(words)))  # pieces join without a seam
    assert len(set((masked - words).tolist())) == len(words)
    masks.add_mask(masked, seed, bytes(32), 0, minus=True)
    assert np.array_equal(masked, words)
    streams = [masks.mask(*how, 4).tobytes() for how in ((seed, bytes(32), 0), (seed, bytes(32), 1), (seed, b"c" * 32, 0))]
    assert len({*streams, masks.mask(fresh_bytes(32), bytes(32), 0, 4).tobytes()}) == 4


@pytest.mark.parametrize("change", ["text", "sender", "recipient", "context"])
def test_a_changed_envelope_is_refused(change: str) -> None:
    secret, context = fresh_bytes(32), bytes(32)
    data = masks.close_envelope(secret, context, 1, 2, b"shares")
    assert masks.open_envelope(secret, context, 1, 2, data) == b"shares"
    wrong = (
        secret,
        b"d" * 32 if change == "context" else context,
        2 if change == "sender" else 1,
        1 if change == "recipient" else 2,
        bytes([data[0] ^ 1]) + data[1:] if change == "text" else data,
    )
    with pytest.raises(ProtocolError, match="changed on their way"):
        masks.open_envelope(*wrong)


# -- cohorts -----------------------------------------------------------------------------------------------------------------------------

ranges = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).map(lambda pair: (min(pair), max(pair))), max_size=3)


@given(st.dictionaries(st.integers(0, 6), ranges, max_size=5))
def test_cohorts_are_the_owner_sets_column_by_column(owned: dict[int, list[tuple[int, int]]]) -> None:
    apart = {client: sorted(set().union(*(range(*one) for one in parts))) for client, parts in owned.items()}
    found = cohorts_of({client: [(column, column + 1) for column in columns] for client, columns in apart.items()})
    expected: dict[int, tuple[int, ...]] = {}
    for column in range(31):
        if owners := tuple(sorted(client for client, columns in apart.items() if column in columns)):
            expected[column] = owners
    assert {column: cohort.owners for cohort in found for one in cohort.ranges for column in range(*one)} == expected
    assert len({cohort.owners for cohort in found}) == len(found)
    for client, columns in apart.items():
        assert [column for one in owned_by(found, client) for column in range(*one)] == columns


def test_openable_counts_the_owners_that_came_through() -> None:
    cohort = Cohort((1, 2, 3, 4), ((0, 5),))
    assert openable(cohort, (1, 2, 4, 9), 3)
    assert not openable(cohort, (1, 2, 4), 4)
    assert not openable(cohort, (1, 2, 8, 9), 3)
    assert not openable(cohort, (1, 2), 1)  # no minimum undercuts three


@given(st.lists(st.integers(1, 8), min_size=3, max_size=9))
def test_levelled_cuts_leave_no_small_cohort_and_take_back_no_more_than_needed(cuts: list[int]) -> None:
    level = levelled(dict(enumerate(cuts)))
    require_cuts(list(level.values()))
    for block in range(8):
        owners, left = sum(cut > block for cut in cuts), sum(cut > block for cut in level.values())
        assert left == (owners if owners >= 3 else 0)


def test_cuts_that_leave_a_block_alone_are_refused_with_the_way_out() -> None:
    require_cuts([2, 2, 2, 1])
    with pytest.raises(ConfigError, match=r"block 2 lies at 1 client \(0\).*at most 2"):
        require_cuts([3, 2, 2, 1])


def test_thresholds_withstand_the_clients_they_say() -> None:
    assert [secure_threshold(count) for count in (3, 4, 5, 10, 50)] == [3, 3, 4, 7, 34]
    for count in range(3, 60):
        assert 2 * secure_threshold(count) > count + (count - 1) // 3
    for count, colluding in ((5, 0), (5, 2), (10, 4)):
        assert 2 * secure_threshold(count, colluding) > count + colluding
        assert 2 * (secure_threshold(count, colluding) - 1) <= count + colluding
    with pytest.raises(ConfigError, match="not possible"):
        secure_threshold(2)
    with pytest.raises(ConfigError, match="not possible"):
        secure_threshold(5, 5)
