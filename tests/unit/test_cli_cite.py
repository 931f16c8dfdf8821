"""apps/cite.py: references of a configuration: what every run uses and what its components name."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest

from splitft.apps import cite
from splitft.config import load_config


class Temporal:
    references: ClassVar[tuple[str, ...]] = ("2501.00001", "1711.05101")


class Plain:
    """A component that follows no paper."""


def test_every_run_cites_its_foundations_once() -> None:
    ids = cite.references_of(load_config(None), {})
    assert set(cite.ALWAYS) <= set(ids)
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("override", "reference", "expected"),
    [
        ("partition.name=length_dirichlet", "2604.26388", True),
        ("partition.name=dirichlet", "1909.06335", True),
        ("partition.name=iid", "1909.06335", False),
        ("aggregator.name=average", "1602.05629", True),
        ("split.labels=client", cite.U_SHAPE, True),
        ("split.labels=server", cite.U_SHAPE, False),
    ],
)
def test_references_of_the_real_components(override: str, reference: str, expected: bool) -> None:
    assert (reference in cite.references_of(load_config(None, [override]), cite.catalogue())) is expected


@pytest.mark.parametrize(
    "override", ["uplink.name=temporal", 'uplink={name="cast", of={name="temporal"}}', 'uplink={name="x", of=[{name="temporal"}]}']
)
def test_component_names_its_papers_also_when_nested(override: str) -> None:
    config = load_config(None, [override])
    ids = cite.references_of(config, {"uplink": {"temporal": Temporal, "cast": Plain}})
    assert ids.count("2501.00001") == ids.count("1711.05101") == 1


def test_a_name_in_another_table_is_another_method() -> None:
    config = load_config(None, ["uplink.name=temporal"])
    assert "2501.00001" not in cite.references_of(config, {"uplink": {}, "policy": {"temporal": Temporal}})


def test_every_reference_of_a_component_is_known_in_full() -> None:
    named = {name for table in cite.catalogue().values() for kind in table.values() for name in getattr(kind, "references", ())}
    assert {*named, *cite.ALWAYS, cite.U_SHAPE} <= set(cite.REFERENCES)


def test_references_are_well_formed() -> None:
    for identifier, paper in cite.REFERENCES.items():
        assert re.fullmatch(r"\d{4}\.\d{4,5}", identifier)
        assert 2000 + int(identifier[:2]) <= paper.year
        entry = cite.render([identifier])
        assert entry.startswith(f"@{'inproceedings' if paper.venue else 'misc'}{{{paper.key},\n")
        assert entry.count("{") == entry.count("}")
    assert len({paper.key for paper in cite.REFERENCES.values()}) == len(cite.REFERENCES)


def test_unknown_reference_is_still_named() -> None:
    assert cite.render(["2501.00001"]) == "% arXiv:2501.00001"
