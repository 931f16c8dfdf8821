from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from data_tokenizer import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from splitft.data.base import Document, FederatedData, Ints, Partition, Segment, TokenRows
from splitft.data.federate import federate
from splitft.data.partitions.by_column import ByColumn
from splitft.data.partitions.files import Files
from splitft.data.partitions.iid import Iid
from splitft.data.partitions.length_dirichlet import LengthDirichlet
from splitft.errors import ConfigError, DataError

TOKENIZER = byte_tokenizer()


def texts(count: int, size: int = 12) -> list[Document]:
    """Different texts of `size` to `2 * size` characters; each names its number."""
    return [
        Document(
            (Segment(f"<{number}>".ljust(size + number % size, "."), trained=True),),
            owner=f"file{number % 3}",
            columns={"kind": "ab"[number % 2]},
            origin=f"texts.txt:{number + 1}",
        )
        for number in range(count)
    ]


def make(
    documents: Sequence[Document], partition: Partition | None = None, clients: int = 2, seed: int = 0, **options: Any
) -> FederatedData:
    return federate(iter(documents), TOKENIZER, partition or Iid(), clients, seed, **{"block_tokens": 16, **options})


def slices(data: FederatedData) -> Iterator[tuple[list[int], TokenRows]]:
    """(documents by the manifest, rows) of every slice."""
    yield data.manifest["common_held_out"]["documents"], data.common_held_out
    for client, record in zip(data.clients, data.manifest["clients"], strict=True):
        yield record["train"]["documents"], client.train
        yield record["held_out"]["documents"], client.held_out


@settings(deadline=None, max_examples=25)
@given(count=st.integers(20, 40), clients=st.integers(1, 4), packing=st.sampled_from(["blocks", "documents"]), seed=st.integers(0, 5))
def test_every_document_is_in_one_slice_and_rows_hold_no_other(count: int, clients: int, packing: str, seed: int) -> None:
    documents = texts(count)
    data = make(documents, clients=clients, packing=packing, seed=seed, block_tokens=40)
    found = list(slices(data))
    assert sorted(index for indices, _ in found for index in indices) == list(range(count))
    for indices, made in found:
        text = TOKENIZER.decode(made.ids)
        assert len(made)
        assert all((f"<{number}>" in text) <= (number in indices) for number in range(count))
    assert all(client.documents == len(record["train"]["documents"]) + len(record["held_out"]["documents"])
               for client, record in zip(data.clients, data.manifest["clients"], strict=True))  # fmt: skip


def test_shares_are_as_asked() -> None:
    data = make(texts(200), clients=2, held_out=0.2, common_held_out=0.1)
    assert [len(indices) for indices, _ in slices(data)] == [20, 72, 18, 72, 18]


def test_the_same_seed_gives_the_same_data_and_another_seed_other() -> None:
    one, same, other = (make(texts(60), seed=seed) for seed in (1, 1, 2))
    assert one.manifest == same.manifest
    assert all(np.array_equal(a.ids, b.ids) for (_, a), (_, b) in zip(slices(one), slices(same), strict=True))
    assert one.manifest["clients"] != other.manifest["clients"]


def test_the_common_slice_does_not_depend_on_the_partition() -> None:
    commons = [make(texts(60), partition).manifest["common_held_out"] for partition in (Iid(), Files(), LengthDirichlet())]
    assert commons[0] == commons[1] == commons[2]


def test_copies_of_a_text_stay_on_one_side() -> None:
    documents = [document for document in texts(30) for _ in range(1 + int(document.origin[-1]) % 3)]
    for seed in range(5):
        data = make(documents, clients=2, seed=seed, held_out=0.3, common_held_out=0.3)
        (common, _), *rest = slices(data)
        sides = [{documents[index].digest() for index in indices} for indices, _ in rest]
        assert not sides[0] & sides[1]
        assert not sides[2] & sides[3]
        assert not {documents[index].digest() for index in common} & (sides[0] | sides[1] | sides[2] | sides[3])


def test_a_text_with_too_many_copies_is_trained() -> None:
    documents = texts(1) * 50 + texts(12)[1:]
    for seed in range(20):
        data = make(documents, clients=1, seed=seed, held_out=0.1, common_held_out=0)
        assert len(data.manifest["clients"][0]["held_out"]["documents"]) == 6


def test_nothing_is_held_out_on_request() -> None:
    data = make(texts(4), clients=4, held_out=0, common_held_out=0)
    assert [len(client.train) for client in data.clients] == [1] * 4
    assert all(not len(client.held_out) for client in data.clients)
    assert not len(data.common_held_out)


def test_less_than_a_block_is_kept_as_a_short_row() -> None:
    data = make(texts(8), clients=2, block_tokens=1000)
    assert [len(client.train) for client in data.clients] == [len(client.held_out) for client in data.clients] == [1, 1]


def test_the_manifest_is_json_and_tells_how() -> None:
    data = make(texts(60), LengthDirichlet(alpha=0.7), clients=3)
    manifest = json.loads(json.dumps(data.manifest))
    assert manifest["partition"] == {"name": "length_dirichlet", "alpha": 0.7, "buckets": 10, "minimum": 2}
    assert (manifest["seed"], manifest["documents"], len(manifest["sha256"])) == (0, 60, 64)
    record = manifest["clients"][2]
    assert (record["client"], record["name"]) == (2, "client-2")
    made = data.clients[2].train
    assert (record["train"]["rows"], record["train"]["tokens"], record["train"]["target_tokens"]) == (
        len(made),
        made.tokens,
        made.target_tokens,
    )
    changed = texts(60)
    changed[7] = Document((Segment("other", trained=True),), origin="texts.txt:8")
    assert make(changed, LengthDirichlet(alpha=0.7), clients=3).manifest["sha256"] != manifest["sha256"]


def test_length_histograms_and_skew() -> None:
    short, long = texts(40, size=5), [Document((Segment(f"{number}" * 60, True),), owner="long") for number in range(10, 50)]
    short = [Document(document.segments, owner="short") for document in short]
    apart = make(short + long, Files(), clients=2, common_held_out=0)
    alike = make(short + long, Iid(), clients=2, common_held_out=0)
    assert apart.skew_index == pytest.approx(0.5)
    assert alike.skew_index < 0.2
    assert make(short, clients=1).skew_index == 0
    for data in (apart, alike):
        assert [sum(counts) for counts in data.length_histograms] == [client.documents for client in data.clients]
        assert all(len(counts) == len(data.length_edges) - 1 for counts in data.length_histograms)
        assert data.length_edges == sorted(set(data.length_edges))


def test_documents_of_one_length_have_one_bucket() -> None:
    data = make([Document((Segment(f"{number}", True),)) for number in range(10, 30)])
    assert (data.length_edges, data.skew_index) == ([3, 4], 0)


def test_names() -> None:
    assert [client.name for client in make(texts(60), ByColumn("kind"), clients=0).clients] == ["a", "b"]
    assert [client.name for client in make(texts(60), names=("Ann", "Bob")).clients] == ["Ann", "Bob"]
    for names in (("Ann",), ("Ann", "Ann")):
        with pytest.raises(ConfigError, match="client names for 2 clients"):
            make(texts(60), names=names)


def test_no_documents() -> None:
    with pytest.raises(DataError, match="gave no document"):
        make([])


def test_more_clients_than_documents() -> None:
    with pytest.raises(DataError, match=r"9 of 10 documents .* too few for 5 clients of at least 2.*split = .paragraph."):
        make(texts(10), clients=5)


def test_a_missing_column_is_named_with_its_line() -> None:
    documents = [*texts(20), Document((Segment("x", True),), origin="more.jsonl:1")]
    with pytest.raises(DataError, match=r"more\.jsonl:1: no column 'kind'.*it has: none"):
        make(documents, ByColumn("kind"))


def test_a_client_with_copies_of_one_text_only_is_named() -> None:
    documents = texts(20) + [Document((Segment("same", True),), owner="poor")] * 5
    with pytest.raises(DataError, match=r"Client \d \(poor\) has \d documents \(1 different\).*no held-out row"):
        make(documents, Files(), clients=0, common_held_out=0)


def test_a_client_whose_prompts_fill_the_rows_is_named() -> None:
    long_prompt = [Document((Segment(f"{number}" * 30, False), Segment("a", True)), owner="long") for number in range(10, 20)]
    with pytest.raises(DataError, match=r"Client 3 \(long\) has 10 documents.*no training row.*reach behind the prompts"):
        make(texts(20) + long_prompt, Files(), clients=0, packing="documents", common_held_out=0)


@dataclass(frozen=True)
class Greedy(Partition):
    """Gives everything to the first client."""

    name: ClassVar[str] = "greedy"

    def split(
        self, lengths: Ints, columns: Sequence[Mapping[str, str]], owners: Sequence[str], clients: int, seed: int
    ) -> tuple[Ints, ...]:
        return (np.arange(len(lengths)), *[np.zeros(0, np.int64)] * (clients - 1))


def test_a_client_without_documents_is_named() -> None:
    with pytest.raises(DataError, match=r"Client 1 has no documents\. Use fewer clients"):
        make(texts(20), Greedy())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"packing": "lines"}, "packing is 'lines'"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"common_held_out": -0.1}, "common_held_out is -0.1"),
        ({"block_tokens": 1}, "block_tokens is 1"),
    ],
)
def test_options_are_checked(options: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        make(texts(20), **options)


def test_a_tokenizer_may_know_more_tokens_than_the_model_but_no_text_may_have_them() -> None:
    documents = [*texts(20), Document((Segment("é" * 30, trained=True),), origin="texts.txt:99")]
    largest = max(int(made.ids.max()) for _, made in slices(make(documents, clients=1)))
    assert largest + 1 < len(TOKENIZER)
    assert make(documents, clients=1, vocabulary=largest + 1).manifest == make(documents, clients=1).manifest
    with pytest.raises(DataError, match=rf"texts\.txt:99: token {largest} \('.'\) is not in the model's vocabulary of {largest} "):
        make(documents, clients=1, vocabulary=largest)


def test_with_nothing_held_out_by_clients_the_common_slice_must_have_a_row() -> None:
    copies = [texts(1)[0]] * 8
    assert not len(make(copies, clients=2, held_out=0, common_held_out=0).common_held_out)
    with pytest.raises(DataError, match="common held-out slice has no row"):
        make(copies, clients=2, held_out=0, common_held_out=0.2)
