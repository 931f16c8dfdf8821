"""apps/cite.py: references of a configuration: what every run uses and what its components name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, get_args

import pytest

from splitft import catalog
from splitft.apps import cite
from splitft.config import Component, RunConfig, SplitSection, load_config

ROOT = Path(__file__).resolve().parents[2]
METHODS = (ROOT / "docs" / "methods.md").read_text("utf-8")


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
        ("aggregator.name=product", "2503.00813", True),
        ("aggregator.name=product", "2403.12313", False),
        ("aggregator={name='fed_adam', rule='product'}", "2003.00295", True),
        ("aggregator={name='fed_adam', rule='product'}", "2402.11505", True),
        ("aggregator={name='fed_adam', rule={name='krum', rule='stack'}}", "2409.05976", True),
        ("policy.name=combined", "2403.13101", True),
        ("policy.name=fixed", "2403.13101", False),
        ("ranks.name=importance", "2505.02795", True),
        ("synchronisation.name=drift", "2505.04535", True),
        ("work.name=balanced", "2007.07481", True),
        ("uplink.name=quantize", "2208.07339", True),
        ("downlink.name=quantize", "1610.02132", True),
        ("uplink.name=cast", "1610.02132", False),
        ("uplink.name=temporal", "2602.10564", True),
        ("uplink.name=lowrank", "2608.23018", True),
        ("uplink={name='entropy', inner='quantize'}", "2208.07339", True),
        ("uplink={name='projection', inner={name='residual', inner='lowrank'}}", "2608.23018", True),
        ("uplink.name=residual", "2206.01299", True),
        ("uplink.name=residual", "1311.2540", True),
        ("uplink={name='residual', inner='cast'}", "1311.2540", False),
        ("downlink.name=projection", "2206.01299", True),
        ("downlink.name=projection", "1311.2540", True),
        ("downlink.name=feedback", "1809.07599", True),
        ("exit_downlink.name=error_bounded", "1311.2540", True),
        ("exit_uplink.name=randk", "1610.05492", True),
        ("adapter_uplink.name=topk", "2305.18469", True),
        ("adapter_downlink.name=error_bounded", "1311.2540", True),
        ("adapter_downlink.name=same", "1311.2540", False),
        ("controller.name=ddpg", "1509.02971", True),
        ("controller.name=bang_bang", "2602.10564", True),
        ("controller.name=energy", "2602.10564", False),
        ("split.labels=client", cite.U_SHAPE, True),
        ("split.labels=server", cite.U_SHAPE, False),
        ("split.server=unaveraged", "2012.12591", True),
        ("split.server=per_client", "2012.12591", False),
        ("split.server=shared", "2407.00952", True),
        ("split.server=sequential", "2004.12088", True),
        ("network.downlink_order=longest_first", "2511.15404", True),
        ("network.downlink_order=together", "2511.15404", False),
        ("clients.buffer=2", "2106.06639", True),
        ("clients.buffer=2", "1903.03934", True),
        ("clients.buffer=0", "1903.03934", False),
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


def test_a_rule_by_name_is_cited_and_other_texts_are_not_taken_for_names() -> None:
    config = load_config(None, ["aggregator={name='temporal', rule='plain', title='other'}"])
    table = {"temporal": Plain, "plain": Temporal, "other": type("Other", (), {"references": ("2501.00002",)})}
    ids = cite.references_of(config, {"aggregator": table})
    assert "2501.00001" in ids
    assert "2501.00002" not in ids
    assert set(cite.NESTED) == set(catalog.INNER.values())


def test_no_component_of_the_configuration_is_left_out() -> None:
    assert set(cite.SEAMS) == {name for name, field in RunConfig.model_fields.items() if field.annotation is Component}


def test_every_server_mode_is_either_the_foundation_s_or_has_a_paper() -> None:
    modes = get_args(SplitSection.model_fields["server"].annotation)
    assert set(modes) == {"per_client", *cite.SERVER_MODES}


def test_every_reference_that_a_run_may_name_is_known_in_full() -> None:
    named = {name for table in cite.catalogue().values() for kind in table.values() for name in getattr(kind, "references", ())}
    by_field = {*cite.SERVER_MODES.values(), cite.LONGEST_FIRST, *cite.ASYNCHRONOUS, cite.U_SHAPE}
    assert {*named, *by_field, *cite.ALWAYS} <= set(cite.REFERENCES)


def test_every_arxiv_id_of_sources_and_pages_is_known_in_full() -> None:
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    cited = {found for file in files for found in re.findall(r"arxiv(?:\.org/abs/|:| )(\d{4}\.\d{4,5})", file.read_text("utf-8"), re.I)}
    assert len(cited) > 30
    assert cited <= set(cite.REFERENCES)


@pytest.mark.parametrize("seam", ["policy", "ranks", "work", "uplink", "controller", "aggregator", "synchronisation"])
def test_the_methods_page_has_every_method_and_its_papers(seam: str) -> None:
    for name, kind in cite.catalogue()[seam].items():
        assert f"`{name}`" in METHODS, name
        for reference in getattr(kind, "references", ()):
            assert f"arxiv.org/abs/{reference}" in METHODS, (name, reference)


def test_the_methods_page_has_what_plain_fields_follow() -> None:
    for reference in (*cite.SERVER_MODES.values(), cite.LONGEST_FIRST, *cite.ASYNCHRONOUS):
        assert f"arxiv.org/abs/{reference}" in METHODS


def test_the_methods_page_says_of_every_aggregation_rule_what_it_can_do() -> None:
    """Its table: rule, unequal ranks, folds into the frozen weights, uploads in parts."""
    rows = dict(re.findall(r"^\| `(\w+)` \| ((?:[^|\n]+ \| )+)[^|\n]*\|$", METHODS.split("## What goes with what")[1], re.MULTILINE))
    for name, kind in catalog.AGGREGATORS.items():
        rule = kind()
        said = [cell.strip().startswith("yes") for cell in rows[name].split("|")[:3]]
        assert said == [rule.unequal_ranks, rule.folds, rule.partial_uploads], name


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
