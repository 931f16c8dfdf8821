"""apps/doctor.py: each check on machines of every kind."""

from __future__ import annotations

import importlib.metadata
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from splitft.apps import doctor
from splitft.apps.console import Threads
from splitft.apps.doctor import GIB


@pytest.mark.parametrize(("version", "status"), [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 2), "ok"), ((3, 14, 0), "fail")])
def test_python(version: tuple[int, ...], status: str) -> None:
    check = doctor.check_python(version)
    assert check.status == status
    assert bool(check.remedy) == (status == "fail")


def test_packages_against_their_ranges() -> None:
    versions = {"torch": "2.13.0+cpu", "peft": "0.16.1", "rich": "15.0.0rc1"}

    def version_of(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    checks = {check.name: check for check in doctor.check_packages(["torch>=2.6", "peft>=0.17", "rich>=13", "typer>=0.15"], version_of)}
    assert {name: check.status for name, check in checks.items()} == {"torch": "ok", "peft": "fail", "rich": "ok", "typer": "fail"}
    assert checks["peft"].detail == "0.16.1 is outside >=0.17"
    assert "not installed" in checks["typer"].detail
    assert all(check.remedy for check in checks.values() if check.status == "fail")


def test_requirements_are_unknown_without_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert doctor.declared_requirements() == []
    assert [check.status for check in doctor.check_packages([], importlib.metadata.version)] == ["warn"]


def test_declared_requirements_leave_extras_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.6", 'datasets>=3; extra == "data"'])
    assert doctor.declared_requirements() == ["torch>=2.6"]


def test_more_threads_than_cores_is_a_warning() -> None:
    assert doctor.check_threads(Threads(2, "cores"), 2).status == "ok"
    crowded = doctor.check_threads(Threads(8, "OMP_NUM_THREADS"), 2)
    assert (crowded.status, crowded.detail) == ("warn", "8 threads (by OMP_NUM_THREADS), cores usable: 2")


@pytest.mark.parametrize(("available_bytes", "status"), [(0, "warn"), (GIB - 1, "fail"), (2 * GIB, "warn"), (8 * GIB, "ok")])
def test_memory(available_bytes: int, status: str) -> None:
    assert doctor.check_memory(available_bytes).status == status


def test_memory_is_read_from_linux_or_the_system(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 9 kB\nMemAvailable:    2048 kB\n")
    assert doctor.available_memory_bytes(file) == 2048 * 1024
    assert doctor.available_memory_bytes(tmp_path / "absent") >= 0


@pytest.mark.parametrize(("free_bytes", "status"), [(GIB // 8, "fail"), (GIB, "warn"), (3 * GIB, "ok")])
def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_bytes: int, status: str) -> None:
    usage = type("Usage", (), {"free": free_bytes})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor.check_disk(tmp_path).status == status


def test_processor_flags(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nflags\t\t: fpu avx512_bf16\n\nprocessor : 1\nflags : other\n")
    assert doctor.processor_flags(file) == {"fpu", "avx512_bf16"}
    file.write_text("Features : asimd bf16\n")
    assert "bf16" in doctor.processor_flags(file)
    file.write_text("nothing\n")
    assert doctor.processor_flags(file) == doctor.processor_flags(tmp_path / "absent") == frozenset()


def test_device_names_what_auto_takes() -> None:
    device, bfloat16 = doctor.check_device()
    assert device.status == "ok"
    assert device.detail.split(":")[0] in ("cpu", "cuda", "mps")
    assert bfloat16.status in ("ok", "warn")


@pytest.mark.parametrize(("value", "part"), [("1", "is set"), ("true", "is set"), ("", "allowed"), ("0", "allowed")])
def test_hub(value: str, part: str) -> None:
    assert part in doctor.check_hub(value).detail


def test_missing_embedded_model_fails_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "config.json").write_text("{}")  # no weights beside it
    check = doctor.check_embedded(tmp_path)
    assert (check.status, bool(check.remedy)) == ("fail", True)
    assert doctor.check_embedded(tmp_path / "absent").status == "fail"


def test_damaged_embedded_model_fails(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "model.safetensors").write_bytes(b"damaged")
    check = doctor.check_embedded(tmp_path)
    assert check.status == "fail"
    assert "base does not load" in check.detail


def test_whole_embedded_model_is_loaded(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "base")
    GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "base")
    check = doctor.check_embedded(tmp_path)
    assert (check.status, check.detail) == ("ok", "base, 0.0 M parameters")


def test_all_checks_run_here(tmp_path: Path) -> None:
    names = [check.name for check in doctor.examine(Threads(1, "cores"), tmp_path)]
    assert names[0] == "Python"
    assert {"threads", "memory", "disk", "device", "bfloat16", "embedded model", "hub"} <= set(names)


def test_shown_as_lines_with_remedies_and_a_sum() -> None:
    screen = io.StringIO()
    checks = [doctor.Check("disk", "ok", "5 GiB [x]"), doctor.Check("memory", "fail", "none", "Buy some.")]
    doctor.show(checks, Console(file=screen, width=100))
    lines = screen.getvalue().splitlines()
    assert lines[0].split() == ["ok", "disk", "5", "GiB", "[x]"]
    assert lines[2].strip() == "→ Buy some."
    assert lines[3] == "2 checks: 1 failed, 0 with a warning."
