"""`splitft doctor`: what this machine offers a run, line by line, with a remedy where something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from splitft.apps.console import Threads, usable_cores

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["ok", "warn", "fail"]
GIB = 1 << 30
MINIMUM_PYTHON, BEYOND_PYTHON = (3, 11), (3, 14)
ASSETS = Path(__file__).resolve().parents[1] / "assets"
REINSTALL = "Call make setup, or pip install -e . in the repository."


class Check(NamedTuple):
    """One line: what was looked at, how it is, and what to do if it is not well."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(threads: Threads, assets: Path = ASSETS) -> list[Check]:
    """Every check, in reading order. Imports torch, and transformers if there is an embedded model."""
    checks = [check_python(sys.version_info[:3]), *check_packages(declared_requirements(), importlib.metadata.version)]
    checks += [check_threads(threads, usable_cores()), check_memory(available_memory_bytes()), check_disk(Path.cwd())]
    checks += check_device()
    checks.append(check_ray(importlib.metadata.version))
    checks += [check_embedded(assets), check_hub(os.environ.get("HF_HUB_OFFLINE", ""))]
    return checks


def check_python(version: tuple[int, ...]) -> Check:
    text = ".".join(str(part) for part in version)
    if MINIMUM_PYTHON <= version[:2] < BEYOND_PYTHON:
        return Check("Python", "ok", text)
    return Check("Python", "fail", text, "splitft needs Python 3.11, 3.12 or 3.13: make setup PYTHON=python3.12")


def declared_requirements() -> list[str]:
    """What the installed package declares to need, extras left out; empty if it is not installed as a package."""
    try:
        declared = importlib.metadata.requires("splitft") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [line for line in declared if "extra ==" not in line]


def check_packages(requirements: Sequence[str], version_of: Callable[[str], str]) -> Iterator[Check]:
    """One line per required package: the version found against the range declared. `version_of` raises PackageNotFoundError."""
    from packaging.requirements import Requirement

    if not requirements:
        yield Check("splitft", "warn", "not installed as a package, so its requirements are unknown", REINSTALL)
    for requirement in map(Requirement, requirements):
        try:
            version = version_of(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(requirement.name, "fail", f"not installed (needed: {requirement.specifier})", REINSTALL)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Check(requirement.name, "ok", version)
        else:
            yield Check(requirement.name, "fail", f"{version} is outside {requirement.specifier}", REINSTALL)


def check_threads(threads: Threads, cores: int) -> Check:
    detail = f"{threads.describe()}, cores usable: {cores}"
    if threads.number > cores:
        return Check("threads", "warn", detail, "More threads than cores are slow: unset OMP_NUM_THREADS or set engine.threads.")
    return Check("threads", "ok", detail)


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory a new process can take without swapping: Linux says so itself, elsewhere all physical memory; 0 if unknown."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


def check_memory(available_bytes: int) -> Check:
    detail = f"{available_bytes / GIB:.1f} GiB available"
    if available_bytes == 0:
        return Check("memory", "warn", "unknown")
    if available_bytes < GIB:
        return Check("memory", "fail", detail, "Importing torch and training the embedded model takes about 1 GiB: close other programs.")
    if available_bytes < 4 * GIB:
        return Check("memory", "warn", detail, "Enough for the embedded model; larger ones need more.")
    return Check("memory", "ok", detail)


def check_disk(folder: Path) -> Check:
    free_bytes = shutil.disk_usage(folder).free
    detail = f"{free_bytes / GIB:.1f} GiB free in the working folder"
    if free_bytes < GIB // 4:
        return Check("disk", "fail", detail, "Free some space, or set run.folder to another disk.")
    if free_bytes < 2 * GIB:
        return Check("disk", "warn", detail, "Enough for small runs; set run.folder to another disk for larger ones.")
    return Check("disk", "ok", detail)


def check_device() -> Iterator[Check]:
    """The device `engine.device = "auto"` takes, and whether it computes bfloat16 natively."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("device", "fail", f"torch cannot be imported: {error}", REINSTALL)
        return
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        yield Check("device", "ok", f"cuda: {properties.name}, {properties.total_memory / GIB:.0f} GiB")
        yield _bfloat16(torch.cuda.is_bf16_supported(including_emulation=False))
    elif torch.backends.mps.is_available():
        yield Check("device", "ok", "mps: Apple GPU")
        yield _bfloat16(True)
    else:
        yield Check("device", "ok", f"cpu: {torch.backends.cpu.get_cpu_capability()}")
        yield _bfloat16(bool({"amx_bf16", "avx512_bf16", "bf16"} & processor_flags()))


def _bfloat16(native: bool) -> Check:
    if native:
        return Check("bfloat16", "ok", "native")
    return Check("bfloat16", "warn", "emulated, so slow", 'Leave model.dtype at "auto", which takes float32 here.')


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Feature flags of the first processor (Linux; x86 calls them flags, ARM Features); empty elsewhere."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def embedded_folder(assets: Path) -> Path | None:
    """The checkpoint that comes with the package: the first folder with a config.json and weights."""
    for config in sorted(assets.rglob("config.json")) if assets.is_dir() else ():
        if any(config.parent.glob("*.safetensors")):
            return config.parent
    return None


def check_embedded(assets: Path) -> Check:
    """Loads the embedded model and its tokenizer and computes one token."""
    folder = embedded_folder(assets)
    if folder is None:
        return Check(
            "embedded model", "fail", f"none in {assets}", "The package is incomplete: reinstall it, or clone the repository again."
        )
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        with torch.no_grad():
            logits = model(**tokenizer("The", return_tensors="pt")).logits
        finite = bool(torch.isfinite(logits).all())
    except Exception as error:  # whatever the libraries raise, the answer is the same line
        return Check("embedded model", "fail", f"{folder.name} does not load: {error}", "The package is damaged: reinstall it.")
    if not finite:
        return Check(
            "embedded model", "fail", f"{folder.name} computes values that are not finite", "The package is damaged: reinstall it."
        )
    return Check("embedded model", "ok", f"{folder.name}, {sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters")


def check_ray(version_of: Callable[[str], str]) -> Check:
    """Ray is optional: without it all runs stay on one machine."""
    try:
        return Check("ray", "ok", f'{version_of("ray")}, for engine.name = "ray"')
    except importlib.metadata.PackageNotFoundError:
        return Check("ray", "ok", 'not installed; engine.name = "ray" needs it: pip install "splitft[ray]"')


def check_hub(offline: str) -> Check:
    if offline.strip().lower() in {"1", "on", "yes", "true"}:
        return Check("hub", "ok", "HF_HUB_OFFLINE is set: only models and data on this machine")
    return Check("hub", "ok", "downloads allowed for hub names; set HF_HUB_OFFLINE=1 to forbid them")


def show(checks: Sequence[Check], console: Console | None = None) -> None:
    """Print the checks as a table and a last line that sums them up."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    table = Table(box=None, show_header=False, pad_edge=False)
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for check in checks:
        told = Text(check.detail)
        if check.remedy:
            told.append(f"\n→ {check.remedy}", style=colours[check.status])
        table.add_row(Text(check.status, style=colours[check.status]), Text(check.name), told)
    console.print(table)
    failed, warned = (sum(check.status == status for check in checks) for status in ("fail", "warn"))
    console.print(Text(f"{len(checks)} checks: {failed} failed, {warned} with a warning."))
