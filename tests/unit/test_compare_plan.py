"""What a comparison consists of: who overrides whom, how runs are named, what is refused before anything runs."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitft.apps.compare_plan import (
    Request,
    Variant,
    component_problems,
    compose,
    expand,
    file_names,
    known_methods,
    parse_seeds,
    parse_sweep,
    read_method,
    request_of,
)
from splitft.config import load_config
from splitft.errors import ConfigError

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.toml"
    path.write_text(
        'rounds = 4\n[clients]\ncount = 6\nparticipation = 0.5\n[train]\nbatch_size = 2\n[policy]\nname = "fixed"\ncuts = [1]\n'
    )
    return path


def overlay(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.toml").write_text(text)
    return str(folder / f"{name}.toml")


def runs(variants: tuple[Variant, ...]) -> list[str]:
    return [run.name for variant in variants for run in variant.runs]


def test_cartesian_and_in_order(base: Path, tmp_path: Path) -> None:
    one = overlay(tmp_path, "one", "rounds = 2\n")
    request = Request((base,), (one, "base"), ("train.learning_rate=1e-3,1e-2", "lora.rank=2,4"), seeds="2")
    variants = expand(request)
    assert len(variants) == 2 * 2 * 2
    names = runs(variants)
    assert len(names) == len(set(names)) == 16
    assert all(SAFE.fullmatch(name) for name in names)
    assert variants[0].label == "one learning_rate=1e-3 rank=2"
    config = variants[0].runs[1].config
    assert (config.rounds, config.train.learning_rate, config.lora.rank, config.seed) == (2, 1e-3, 2, 1)
    assert config.name == variants[0].runs[1].name
    assert config.engine.threads == 1
    found = {(v.runs[0].config.rounds, v.runs[0].config.train.learning_rate, v.runs[0].config.lora.rank) for v in variants}
    assert found == set(itertools.product((2, 4), (1e-3, 1e-2), (2, 4)))


def test_several_configurations_are_told_apart(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "deep" / "base.toml"
    other.parent.mkdir()
    other.write_text("rounds = 9\n")
    variants = expand(Request((base, other)))
    assert len({variant.name for variant in variants}) == 2
    assert [variant.runs[0].config.rounds for variant in variants] == [4, 9]
    assert "deep" in variants[1].label


def test_the_command_line_wins_over_the_method_and_the_method_over_the_file(base: Path, tmp_path: Path) -> None:
    method = overlay(tmp_path, "mine", 'rounds = 2\npolicy = { name = "fixed", cuts = [3] }\naggregator = { name = "average" }\n')
    config = expand(Request((base,), (method,)))[0].runs[0].config
    assert (config.rounds, config.policy.fields) == (2, {"cuts": [3]})
    config = expand(Request((base,), (method,), overrides=("rounds=7", "policy.cuts=[2]")))[0].runs[0].config
    assert (config.rounds, config.policy.fields) == (7, {"cuts": [2]})
    assert config.clients.count == 6


def test_another_component_drops_what_the_method_said_of_the_first() -> None:
    assert compose(["policy.name=a", "policy.cuts=[3]", "rounds=1"], ["policy=b"]) == ["rounds=1", "policy=b"]
    assert compose(["policy.name=a", "policy.cuts=[3]"], ["policy.name=a"]) == ["policy.cuts=[3]", "policy.name=a"]
    assert compose(["rounds=1", "seed=1"], ["rounds=2"]) == ["seed=1", "rounds=2"]


def test_always_wins_scale_and_copy_look_underneath(base: Path, tmp_path: Path) -> None:
    text = (
        '[always]\nclients = { count = 1, participation = 1.0 }\n[scale]\n"train.batch_size" = "participants"\n"lora.rank" = "clients"\n'
        '[copy]\n"clients.profiles" = ["clients.server_profile"]\n'
    )
    method = overlay(tmp_path, "central", text)
    request = Request((base,), (method,), ("train.batch_size=2,5",), ("clients.count=8", "clients.server_profile=raspberry-pi"))
    first, second = (variant.runs[0].config for variant in expand(request))
    assert first.clients.count == 1
    assert (first.train.batch_size, second.train.batch_size) == (2 * 4, 5 * 4)  # half of the eight clients took part
    assert first.lora.rank == 8 * 8
    assert first.clients.profiles == ("raspberry-pi",)


def test_a_sweep_for_one_method_leaves_the_others_alone(base: Path, tmp_path: Path) -> None:
    one, two = overlay(tmp_path, "one", "rounds = 2\n"), overlay(tmp_path, "two", "rounds = 3\n")
    labels = [variant.label for variant in expand(Request((base,), (one, two), ("two:policy.cuts=[1],[2,3]",)))]
    assert labels == ["one", "two cuts=[1]", "two cuts=[2,3]"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("policy.cuts=[1],[2,3]", ("[1]", "[2,3]")),
        ("aggregator=average,product", ("average", "product")),
        ('data.path="a,b",c', ('"a,b"', "c")),
        ('aggregator={name="krum", rule="x"},average', ('{name="krum", rule="x"}', "average")),
    ],
)
def test_commas_inside_a_value_are_its_own(text: str, values: tuple[str, ...]) -> None:
    assert parse_sweep(text).values == values


@pytest.mark.parametrize("text", ["rounds", "=1", "rounds=", "rounds=1,", "rounds=1,1", "a b=1"])
def test_a_sweep_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        parse_sweep(text)


def test_seeds() -> None:
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("0,5, 7") == (0, 5, 7)
    assert parse_seeds("7,") == (7,)
    assert parse_seeds("") == ()
    for text in ("0", "-1", "1,1", "a", ",", "1.5", "9" * 30):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(text)


@given(st.lists(st.text(min_size=1, max_size=130), min_size=1, max_size=8, unique=True))
def test_any_labels_become_distinct_safe_names(labels: list[str]) -> None:
    names = file_names(labels)
    assert all(SAFE.fullmatch(f"{name}-s999999") for name in names)
    assert len({name.lower() for name in names}) == len(labels)  # also on a disk that does not tell case apart


def test_all_problems_of_all_variants_at_once(base: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(Request((base,), (), ("train.learning_rate=1e-3,-5", "rounds=1,nothing")))
    assert len(caught.value.problems) == 4  # 1e-3 with nothing; -5 with 1; two faults in the last
    assert all("learning_rate=" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (Request(methods=("splitlora", "splitlora")), "twice"),
        (Request(methods=("splitlra",)), "splitlora"),
        (Request(sweeps=("rounds=1,2", "rounds=3,4")), "more than once"),
        (Request(sweeps=("rounds=1,2",), overrides=("rounds=3",)), "more than once"),
        (Request(sweeps=("base:rounds=1,2",)), "--method base"),
        (Request(sweeps=("seed=1,2",)), "--seeds"),
        (Request(overrides=("run.folder=x",)), "--folder"),
        (Request(seeds="1000", sweeps=("rounds=" + ",".join(map(str, range(1, 12))),)), "10,000"),
    ],
)
def test_ambiguous_requests_are_refused(request_: Request, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        expand(request_)
    assert word in str(caught.value)


def test_methods_need_known_numbers(base: Path, tmp_path: Path) -> None:
    method = overlay(tmp_path, "m", '[scale]\n"train.batch_size" = "clients"\n')
    for overrides, word in ((("clients.count=0",), "clients.count is 0"), (("train.batch_size=x",), "batch_size")):
        with pytest.raises(ConfigError, match=word):
            expand(Request((base,), (method,), overrides=overrides))
    bad = overlay(tmp_path, "bad", '[scale]\n"model.path" = "clients"\n')
    with pytest.raises(ConfigError, match="numeric"):
        expand(Request((base,), (bad,)))
    with pytest.raises(ConfigError, match=r"no\.such"):
        expand(Request((base,), (overlay(tmp_path, "copy", '[copy]\n"rounds" = "no.such"\n'),)))


def test_command_line_files_and_overrides(base: Path) -> None:
    request = request_of([str(base), "rounds=2"], [], [], "", Path("x"), "y")
    assert (request.configs, request.overrides, request.place) == ((base,), ("rounds=2",), Path("x/y"))
    with pytest.raises(ConfigError, match="--name"):
        request_of([], [], [], "", Path("x"), "../y")
    with pytest.raises(ConfigError, match="twice"):
        request_of([str(base), str(base)], [], [], "", Path("x"), "y")


def test_a_method_file_reads_paths_from_its_own_folder(tmp_path: Path) -> None:
    method = read_method(overlay(tmp_path, "mine", '[data]\nname = "text"\npath = "here.txt"\n'))
    assert f'data.path="{tmp_path / "here.txt"}"' in method.texts
    assert method.texts[0] == 'data.name="text"'


@pytest.mark.parametrize("name", known_methods())
def test_every_method_file_parses_and_its_components_build(name: str) -> None:
    config = expand(Request(methods=(name,)))[0].runs[0].config
    assert component_problems(config) == []
    if config.policy.name == "whole":
        assert (config.split.labels, config.split.tail_blocks, config.split.maximum_cut) == ("client", 0, 0)
    text = (Path(__file__).parents[2] / "src/splitft/assets/methods" / f"{name}.toml").read_text("utf-8")
    assert text.startswith("# ")
    assert 3 <= len(text.splitlines()) <= 20


def test_the_centralised_method_reads_as_many_tokens_as_all_clients() -> None:
    plain = load_config(None)
    config = expand(Request(methods=("centralised",)))[0].runs[0].config
    assert config.clients.count == 1
    assert config.train.batch_size == plain.train.batch_size * plain.clients.count
    assert config.clients.profiles == (plain.clients.server_profile,)
