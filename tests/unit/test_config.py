"""config.py: defaults, files, overrides, paths, round trip, and every fault said at once."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from splitft.config import Component, RunConfig, load_config, override, parse_config
from splitft.errors import ConfigError


def problems(overrides: list[str], values: dict[str, Any] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_config(values or {}, overrides)
    return caught.value.problems


def file_with(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text)
    return file


def test_defaults_need_no_file_and_equal_an_empty_one(tmp_path: Path) -> None:
    assert load_config(None) == load_config(file_with(tmp_path, "")) == RunConfig()


def test_defaults_are_what_the_components_and_sections_say() -> None:
    config = load_config(None)
    assert (config.name, config.seed, config.rounds) == ("run", 0, 5)
    assert config.partition == Component(name="length_dirichlet", fields={"alpha": 0.5})
    assert config.uplink == config.downlink == Component(name="cast", fields={"dtype": "bfloat16"})
    assert (config.train.learning_rate, config.train.clip_norm, config.clients.profiles) == (1e-3, 1.0, ("laptop",))


def test_configuration_does_not_change() -> None:
    config = load_config(None)
    with pytest.raises(ValueError, match="frozen"):
        config.train.batch_size = 8  # type: ignore[misc]


def test_file_then_overrides(tmp_path: Path) -> None:
    file = file_with(tmp_path, 'rounds = 7\n[train]\nbatch_size = 2\nlearning_rate = 1e-4\n[policy]\nname = "fixed"\ncuts = [1]\n')
    config = load_config(file, ["train.batch_size=16", "policy.cuts=[2,3]", "name=first"])
    assert (config.rounds, config.train.batch_size, config.train.learning_rate, config.name) == (7, 16, 1e-4, "first")
    assert config.policy.fields == {"cuts": [2, 3]}


@given(
    rank=st.integers(1, 64),
    rate=st.floats(1e-9, 1.0),
    targets=st.sampled_from(["default", "all", ("attn.c_attn", "mlp.c_fc")]),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
    fields=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda key: key != "name"),
        st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.just([1, {"name": "x"}]),
        max_size=3,
    ),
)
def test_round_trip(rank: int, rate: float, targets: object, name: str, fields: dict[str, Any]) -> None:
    config = parse_config(
        {"name": name, "lora": {"rank": rank, "targets": targets}, "train": {"learning_rate": rate}, "policy": {"name": "mine", **fields}}
    )
    assert parse_config(tomllib.loads(config.to_toml())) == config
    assert parse_config(config.model_dump()) == config
    assert override(config, []) == config


def test_round_trip_through_a_file_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = load_config(file_with(tmp_path, '[model]\npath = "model"\n[data]\nname = "text"\npath = "corpus.txt"\n'))
    elsewhere = tmp_path / "runs" / "first"
    elsewhere.mkdir(parents=True)
    assert load_config(file_with(elsewhere, config.to_toml())) == config


def test_every_problem_is_reported_at_once() -> None:
    values = {
        "rouns": 3,
        "seed": -1,
        "train": {"learning_rte": 2, "learning_rate": 1.5, "schedule": "linaer", "batch_size": True},
        "split": {"tail_blocks": 2},
        "clients": {"profiles": ["a", "b"]},
        "lora": {"rank": "8", "targets": 5},
    }
    found = problems(["nonsense", "engine.name=worker"], values)
    expected = {
        'override "nonsense"': "must read field=value",
        "seed = -1": "at least 0",
        'lora.rank = "8"': "must be a whole number",
        "lora.targets = 5": '"default", "all" or a list',
        "train.batch_size = true": "must be a whole number",
        "train.learning_rate = 1.5": "at most 1",
        'train.schedule = "linaer"': "one of linear, cosine, constant; did you mean linear",
        "train.learning_rte": "did you mean learning_rate",
        'engine.name = "worker"': "did you mean workers",
        "rouns": "did you mean rounds",
        "split.tail_blocks = 2": 'needs split.labels = "client"',
        "clients.profiles": "2 names for 5 clients",
    }
    for start, part in expected.items():
        assert any(line.startswith(start) and part in line for line in found), (start, found)
    assert len(found) == len(expected)


def test_message_counts_and_remedy_names_the_page() -> None:
    with pytest.raises(ConfigError, match="has 1 problem") as caught:
        load_config(None, ["rounds=0"])
    assert caught.value.problems == ("rounds = 0: must be at least 1.",)
    assert "docs/configuration.md" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rounds=1.5", "must be a whole number"),
        ("rounds=five", 'rounds = "five": must be a whole number'),
        ("train.beta1=1.0", "less than 1"),
        ("train.epsilon=0", "more than 0"),
        ("train.learning_rate=nan", "train.learning_rate"),
        ("model.self_check=1", "true or false"),
        ('name="a/b"', "letters, digits"),
        ('name=".."', "start with a letter or digit"),
        ("name=3", "must be text"),
        ('model.path=""', "not be empty"),
        ("clients.profiles=laptop", "list of one or more names"),
        ("clients.profiles=[]", "list of one or more names"),
        ("lora.targets=[1]", "list of module names"),
        ("learning_rate=1", "did you mean train.learning_rate"),
        ("train=5", "must be a table"),
        ("seed.x=1", "seed = {x = 1}: must be a whole number"),
        ("model.trust_remote_code=true", "unknown field"),
        ("policy=5", "policy"),
        ('policy.name=""', "policy.name"),
        ("policy.strength=nan", "finite numbers"),
        ("seed=9223372036854775808", "less than 9223372036854775808"),
        ("=1", "must read field=value"),
        ("a..b=1", "must read field=value"),
    ],
)
def test_one_fault_one_line(text: str, expected: str) -> None:
    found = problems([text])
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["split.tail_blocks=1"], "split.labels"),
        (["clients.count=2", "clients.minimum=3"], "clients.minimum = 3: must be at most clients.count = 2"),
        (["clients.profiles=['a','b','c']"], "3 names for 5 clients"),
        (["rounds=2", "train.local_steps=3", "train.warmup_steps=7"], "6 steps"),
        (["tokens.held_out=0.6", "tokens.common_held_out=0.4"], "less than 1"),
        (["tokens.held_out=0", "tokens.common_held_out=0"], "something to measure"),
    ],
)
def test_contradictions(overrides: list[str], expected: str) -> None:
    found = problems(overrides)
    assert len(found) == 1
    assert expected in found[0]


def test_override_below_a_value_is_refused() -> None:
    assert problems(["seed.x=1"], {"seed": 3}) == ("override seed.x: seed is a value, not a table.",)


def test_contradictions_are_refused_without_load_config_too() -> None:
    with pytest.raises(ConfigError, match="contradicts itself"):
        RunConfig.model_validate({"split": {"tail_blocks": 1}})


def test_a_faulty_field_is_not_reported_again_as_a_contradiction() -> None:
    assert len(problems(["clients.count=-1", "clients.minimum=9"])) == 1


@pytest.mark.parametrize(
    ("overrides", "allowed"),
    [
        (["split.tail_blocks=1", 'split.labels="client"'], 1),
        (["clients.count=0", "clients.profiles=['a','b','c']", "clients.minimum=9"], 9),
        (["train.warmup_steps=50"], 50),
    ],
)
def test_allowed_combinations(overrides: list[str], allowed: int) -> None:
    config = load_config(None, overrides)
    assert allowed in (config.split.tail_blocks, config.clients.minimum, config.train.warmup_steps)


def test_dates_have_no_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file_with(tmp_path, '[policy]\nname = "fixed"\nwhen = 2024-01-01\n'))
    assert "policy" in caught.value.problems[0]
    assert "not 2024-01-01 (date)" in caught.value.problems[0]


class TestComponents:
    def test_short_form(self, tmp_path: Path) -> None:
        config = load_config(file_with(tmp_path, 'policy = "resource"\n'))
        assert config.policy == Component(name="resource")

    def test_table_without_a_name_is_the_default_method(self, tmp_path: Path) -> None:
        config = load_config(file_with(tmp_path, "[partition]\nbuckets = 4\n"))
        assert config.partition == Component(name="length_dirichlet", fields={"alpha": 0.5, "buckets": 4})

    def test_named_table_takes_no_default_fields(self, tmp_path: Path) -> None:
        config = load_config(file_with(tmp_path, '[partition]\nname = "iid"\n'))
        assert config.partition == Component(name="iid")

    def test_override_of_the_name_drops_the_fields_of_the_one_it_replaces(self) -> None:
        values = {"partition": {"name": "dirichlet", "column": "speaker"}}
        assert parse_config(values, ["partition.name=iid"]).partition == Component(name="iid")
        assert parse_config(values, ["partition=iid"]).partition == Component(name="iid")

    def test_override_of_the_same_name_keeps_the_fields(self) -> None:
        values = {"partition": {"name": "dirichlet", "column": "speaker"}}
        assert parse_config(values, ["partition.name=dirichlet"]).partition.fields == {"column": "speaker"}

    @pytest.mark.parametrize("order", [1, -1])
    def test_name_and_fields_in_any_order(self, order: int) -> None:
        config = load_config(None, ["partition.column=speaker", "partition.name=by_column"][::order])
        assert config.partition == Component(name="by_column", fields={"column": "speaker"})

    def test_whole_table(self) -> None:
        config = load_config(None, ['uplink={name = "quantize", bits = 4}'])
        assert config.uplink == Component(name="quantize", fields={"bits": 4})

    def test_nested_component_survives(self) -> None:
        values = {"uplink": {"name": "temporal", "of": {"name": "quantize", "bits": 4}}}
        config = parse_config(values)
        assert config.uplink.fields["of"] == {"name": "quantize", "bits": 4}
        assert tomllib.loads(config.to_toml())["uplink"] == values["uplink"]

    def test_values_given_are_not_changed(self) -> None:
        values: dict[str, Any] = {"partition": {"name": "dirichlet", "column": "speaker"}}
        parse_config(values, ["partition.column=other", "train.batch_size=2"])
        assert values == {"partition": {"name": "dirichlet", "column": "speaker"}}


class TestPaths:
    def test_file_paths_are_seen_from_the_file(self, tmp_path: Path) -> None:
        text = '[data]\nname = "text"\npath = "texts/*.txt"\n[clients]\nprofiles_file = "devices.toml"\n[lora]\nadapter = "../adapter"\n'
        text += '[federation]\nheld_out = "public.txt"\nidentity = "federation"\n'
        config = load_config(file_with(tmp_path, text))
        assert config.data.fields["path"] == str(tmp_path / "texts" / "*.txt")
        assert config.clients.profiles_file == str(tmp_path / "devices.toml")
        assert Path(config.lora.adapter).resolve() == tmp_path.parent / "adapter"
        assert config.federation.held_out == str(tmp_path / "public.txt")
        assert config.federation.identity == "federation", "from the working folder, as run.folder"

    def test_override_paths_are_seen_from_the_working_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        file = file_with(tmp_path, '[data]\nname = "text"\npath = "a.txt"\n')
        assert load_config(file, ["data.path=b.txt"]).data.fields["path"] == str(tmp_path / "here" / "b.txt")
        assert load_config(Path("../run.toml")).data.fields["path"] == str(tmp_path / "a.txt")

    def test_a_model_may_be_a_name_on_the_hub(self, tmp_path: Path) -> None:
        (tmp_path / "local").mkdir()
        for given_path, expected in [
            ("embedded", "embedded"),
            ("openai-community/gpt2", "openai-community/gpt2"),
            ("local", str(tmp_path / "local")),
            ("./missing", str(tmp_path / "missing")),
            ("/models/gpt2", "/models/gpt2"),
        ]:
            assert load_config(file_with(tmp_path, f'[model]\npath = "{given_path}"\n')).model.path == expected

    def test_hub_data_keeps_its_name(self, tmp_path: Path) -> None:
        config = load_config(file_with(tmp_path, '[data]\nname = "hub"\npath = "owner/data"\n'))
        assert config.data.fields["path"] == "owner/data"

    def test_run_folder_stays_as_given(self, tmp_path: Path) -> None:
        assert load_config(file_with(tmp_path, '[run]\nfolder = "results"\n')).run.folder == "results"


def test_every_field_has_a_description() -> None:
    def walk(schema: type[BaseModel], path: str) -> list[str]:
        missing = []
        for name, field in schema.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not Component:
                missing += walk(inner, f"{path}{name}.")
            elif not field.description or not field.description.endswith((".", "-", ")")):
                missing.append(f"{path}{name}")
        return missing

    assert walk(RunConfig, "") == []
