"""apps/cite.py: references of a configuration, from rules and from component classes."""

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
        ("partition.name=length_dirichlet", "1909.06335", True),
        ("partition.name=dirichlet", "1909.06335", True),
        ("partition.name=iid", "1909.06335", False),
        ("aggregator.name=average", "1602.05629", True),
        ("aggregator.name=product", "1602.05629", False),
        ("split.labels=client", "1812.00564", True),
        ("split.labels=server", "1812.00564", False),
    ],
)
def test_rules(override: str, reference: str, expected: bool) -> None:
    assert (reference in cite.references_of(load_config(None, [override]), {})) is expected


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


def test_every_rule_has_its_reference() -> None:
    ids = {*cite.ALWAYS, *(name for names in cite.BY_NAME.values() for name in names), "1812.00564"}
    assert ids <= set(cite.REFERENCES)


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
