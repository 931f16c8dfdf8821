"""What a comparison consists of: configurations, methods laid over them, swept fields and seeds become named runs.

A method is a short TOML file whose values are laid over a configuration. Three of its tables are no configuration:
`[always]` holds what makes the method what it is and wins over the command line too, `[scale]` multiplies a field by a number of the
configuration underneath ("clients" or "participants"), and `[copy]` gives a field the value of another one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from splitft.config import Component, RunConfig, load_config
from splitft.config_values import resolve_paths
from splitft.errors import ConfigError
from splitft.toml import format_value, nearest, read_toml

METHODS_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "methods"
AS_CONFIGURED = "base"
SPECIAL_TABLES = ("always", "scale", "copy")
LONGEST_NAME = 80
MAX_RUNS = 10_000
_SWEEP = re.compile(r"^(?:(?P<method>[^=:\s]+):)?(?P<field>[A-Za-z0-9_.-]+)=(?P<values>.+)$", re.DOTALL)
_COMPONENTS = frozenset(name for name, field in RunConfig.model_fields.items() if field.annotation is Component)


@dataclass(frozen=True)
class Method:
    """A named overlay, as dotted overrides: `texts` give way to the command line, `always` do not; `scale` and `copy` name fields."""

    name: str
    texts: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    scale: Mapping[str, str] | None = None
    copy: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Sweep:
    """A field and the values it takes in turn, for one method only if `method` names it."""

    field: str
    values: tuple[str, ...]
    method: str = ""


@dataclass(frozen=True)
class PlannedRun:
    """One run: `name` is its folder below `runs/`."""

    name: str
    variant: str
    seed: int
    config: RunConfig


@dataclass(frozen=True)
class Variant:
    """What is compared: the runs that differ in nothing but the seed. `label` is for people, `name` for files; `settings`: what sets it
    apart from the configuration underneath, as overrides."""

    name: str
    label: str
    settings: tuple[str, ...]
    runs: tuple[PlannedRun, ...]


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see `expand`."""

    configs: tuple[Path, ...] = ()
    methods: tuple[str, ...] = ()
    sweeps: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    seeds: str = ""
    folder: Path = Path("runs")
    name: str = "comparison"

    @property
    def place(self) -> Path:
        """The folder of the comparison."""
        return self.folder / self.name


def request_of(arguments: Sequence[str], methods: Sequence[str], sweeps: Sequence[str], seeds: str, folder: Path, name: str) -> Request:
    """A request from the command line: arguments without `=`, and files that are there, are configurations, the rest are overrides."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ConfigError(f"--name is {name!r}; allowed are letters, digits, '.', '_' and '-' (at most 100).", "Choose another name.")
    configs = [text for text in arguments if "=" not in text or Path(text).is_file()]
    for text in configs:
        if configs.count(text) > 1:
            raise ConfigError(f"The configuration {text} was given twice.", "Give every file once; --seeds repeats runs.")
    overrides = tuple(text for text in arguments if text not in configs)
    return Request(tuple(map(Path, configs)), tuple(methods), tuple(sweeps), overrides, seeds, folder, name)


def expand(request: Request) -> tuple[Variant, ...]:
    """Every variant with its runs: configurations x methods x swept values x seeds, in that order.

    Raises one ConfigError with the problems of all variants, component names and fields included.
    """
    methods = [read_method(name) for name in request.methods] or [Method("")]
    sweeps = [parse_sweep(text) for text in request.sweeps]
    _check(request, methods, sweeps)
    seeds = parse_seeds(request.seeds)
    paths: tuple[Path | None, ...] = request.configs or (None,)
    stems = _stems(request.configs)
    drafts: list[_Draft] = []
    for (position, path), method in product(enumerate(paths), methods):
        own = [sweep for sweep in sweeps if sweep.method in ("", method.name)]
        for values in product(*(sweep.values for sweep in own)):
            swept = tuple(f"{sweep.field}={value}" for sweep, value in zip(own, values, strict=True))
            head = [stems[position]] if len(paths) > 1 else []
            label = " ".join([*head, *([method.name] if method.name else []), *_short(swept)])
            drafts.append(_Draft(label or (stems[position] if stems else "defaults"), path, method, swept))
    runs = len(drafts) * max(1, len(seeds))
    if runs > MAX_RUNS:
        raise ConfigError(f"The comparison has {runs:,} runs; at most {MAX_RUNS:,} are allowed.", "Sweep fewer values, or divide it.")
    return _build(request, drafts, seeds)


@dataclass(frozen=True)
class _Draft:
    label: str
    path: Path | None
    method: Method
    swept: tuple[str, ...]


def _build(request: Request, drafts: Sequence[_Draft], seeds: Sequence[int]) -> tuple[Variant, ...]:
    names = file_names([draft.label for draft in drafts])
    variants: list[Variant] = []
    problems: list[str] = []
    for draft, name in zip(drafts, names, strict=True):
        try:
            settings = settings_of(draft.path, draft.method, request.overrides, draft.swept)
            config = load_config(draft.path, settings)
            problems += [f"{draft.label}: {problem}" for problem in component_problems(config)]
            runs = tuple(_run(request, draft.path, settings, name, seed) for seed in seeds or (config.seed,))
            own = tuple(text for text in settings if text not in request.overrides)
            variants.append(Variant(name, draft.label, own, runs))
        except ConfigError as problem:
            problems += [f"{draft.label}: {line}" for line in problem.problems or (str(problem),)]
    if problems:
        count = len(problems)
        raise ConfigError(
            f"The comparison has {count} problem{'s' if count != 1 else ''}; nothing was run.",
            "docs/configuration.md lists every field; a sweep for one method only reads METHOD:FIELD=V1,V2.",
            tuple(problems),
        )
    return tuple(variants)


def _run(request: Request, path: Path | None, settings: Sequence[str], variant: str, seed: int) -> PlannedRun:
    name = f"{variant}-s{seed}"
    last = {"seed": seed, "name": name, "run.folder": str(request.place / "runs")}
    config = load_config(path, [*settings, *(f"{field}={format_value(value)}" for field, value in last.items())])
    if config.engine.threads == 0:  # many runs side by side, and the same numbers whatever --jobs says
        config = config.model_copy(update={"engine": config.engine.model_copy(update={"threads": 1})})
    return PlannedRun(name, variant, seed, config)


def settings_of(path: Path | None, method: Method, overrides: Sequence[str], swept: Sequence[str]) -> tuple[str, ...]:
    """All overrides of a variant in their order of strength: method, command line, sweep, what the method insists on."""
    last = list(method.always)
    if method.scale or method.copy:
        base = load_config(path, compose(overrides, swept)).model_dump(mode="json")
        last += [f"{field}={format_value(_scaled(base, method.name, field, by))}" for field, by in (method.scale or {}).items()]
        last += [f"{field}={format_value(_copied(base, method.name, source))}" for field, source in (method.copy or {}).items()]
    return tuple(compose(method.texts, overrides, swept, last))


def compose(*layers: Sequence[str]) -> list[str]:
    """Overrides of all layers, the later ones stronger; who names another component drops what earlier layers said of that component."""
    kept: list[str] = []
    for layer in layers:
        for text in layer:
            field, _, value = text.partition("=")
            section = field.split(".")[0]
            if section in _COMPONENTS and field in (section, f"{section}.name") and not _names(kept, section, value):
                kept = [one for one in kept if one in layer or one.partition("=")[0].split(".")[0] != section]
            kept = [one for one in kept if one.partition("=")[0] != field]
            kept.append(text)
    return kept


def _names(kept: Sequence[str], section: str, value: str) -> bool:
    """Whether an earlier layer named this very component already."""
    return any(
        one.partition("=")[0] in (section, f"{section}.name") and one.partition("=")[2].strip('"') == value.strip('"') for one in kept
    )


def _look_up(base: Mapping[str, Any], method: str, field: str) -> Any:
    value: Any = base
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ConfigError(
                f"method {method!r} takes the value of {field!r}, which is no field of the configuration.", "Correct the file."
            )
        value = value[part]
    return value


def _scaled(base: Mapping[str, Any], method: str, field: str, by: str) -> int | float:
    count, clients = _look_up(base, method, field), base["clients"]
    if clients["count"] == 0:
        raise ConfigError(
            f"method {method!r} multiplies {field} by the number of clients, and clients.count is 0 (one per natural owner).",
            "Set clients.count to their number, or leave this method out.",
        )
    taking_part = min(clients["count"], max(clients["minimum"], round(clients["participation"] * clients["count"])))
    factors = {"clients": clients["count"], "participants": taking_part}
    if by not in factors or isinstance(count, bool) or not isinstance(count, int | float):
        raise ConfigError(
            f"method {method!r}: [scale] {field} = {format_value(by)}; allowed is a numeric field and one of {', '.join(factors)}.",
            "Correct the file.",
        )
    return count * int(factors[by])


def _copied(base: Mapping[str, Any], method: str, source: Any) -> Any:
    """The value of one field, or a list of the values of several."""
    if isinstance(source, list):
        return [_look_up(base, method, str(one)) for one in source]
    return _look_up(base, method, str(source))


def known_methods() -> list[str]:
    return sorted(path.stem for path in METHODS_FOLDER.glob("*.toml"))


def read_method(name: str) -> Method:
    """A method that comes with splitft, one from a file of yours (`path/to/mine.toml`), or `base`: the configuration as it is."""
    if name == AS_CONFIGURED:
        return Method(AS_CONFIGURED)
    own = name.endswith(".toml") or "/" in name
    if not own and name not in known_methods():
        close = nearest(name, known_methods())
        hint = f"Did you mean {close}? " if close else ""
        known = ", ".join([AS_CONFIGURED, *known_methods()])
        raise ConfigError(f"--method {name!r} is not known; known are {known}.", f"{hint}A file of yours is given by its path.")
    path = Path(name) if own else METHODS_FOLDER / f"{name}.toml"
    values = read_toml(path)
    special = {table: values.pop(table, {}) for table in SPECIAL_TABLES}
    for table, content in special.items():
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: [{table}] is {format_value(content)}; it must be a table.", "docs/compare.md describes it.")
    resolve_paths(values, path.resolve().parent)
    scale = {str(field): str(by) for field, by in special["scale"].items()}
    return Method(path.stem, tuple(_texts(values)), tuple(_texts(special["always"])), scale, dict(special["copy"]))


def _texts(values: Mapping[str, Any]) -> Iterator[str]:
    """A file's values as dotted overrides; a component's name comes before its fields."""
    for section, content in values.items():
        if isinstance(content, Mapping) and "." not in section:
            for field in sorted(content, key=lambda field: field != "name"):
                yield f"{section}.{field}={format_value(content[field])}"
        else:
            yield f"{section}={format_value(content)}"


def parse_sweep(text: str) -> Sweep:
    """`[METHOD:]FIELD=V1,V2`: commas inside brackets, braces and quotes belong to a value."""
    match = _SWEEP.match(text)
    values = tuple(value.strip() for value in _divided(match["values"])) if match else ()
    if match is None or not all(values):
        raise ConfigError(
            f"--sweep {text!r} cannot be read.", "Write --sweep train.learning_rate=1e-4,3e-4 or --sweep policy.cuts=[1],[2,3]."
        )
    if len(set(values)) < len(values):
        raise ConfigError(f"--sweep {text!r} has the same value twice.", "Give every value once; --seeds repeats runs.")
    return Sweep(match["field"], values, match["method"] or "")


def _divided(text: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def parse_seeds(text: str) -> tuple[int, ...]:
    """`3` is three seeds, 0 1 2; `0,5,7` are those; `7,` is the one seed 7. Empty: each configuration's own."""
    if not text:
        return ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and len(part) < 19 for part in parts):
        raise ConfigError(f"--seeds {text!r} cannot be read.", "Give a number of seeds, such as 3, or seeds, such as 0,1,2.")
    seeds = [int(part) for part in parts]
    if "," not in text:
        if not 1 <= seeds[0] <= 1000:
            raise ConfigError(f"--seeds {text}: allowed are 1 to 1000 seeds.", f"The one seed {text} is written --seeds {text},")
        return tuple(range(seeds[0]))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text} has the same seed twice.", "Give every seed once: equal seeds give equal runs.")
    return tuple(seeds)


def _check(request: Request, methods: Sequence[Method], sweeps: Sequence[Sweep]) -> None:
    """What would make the request ambiguous. Raises ConfigError."""
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--method {name!r} was given twice.", "Give every method once; --seeds repeats runs.")
    given = {text.partition("=")[0] for text in request.overrides}
    fields = [(sweep.method, sweep.field) for sweep in sweeps]
    for sweep in sweeps:
        if sweep.method and sweep.method not in names:
            raise ConfigError(
                f"--sweep {sweep.method}:{sweep.field} is for a method that is not compared.", f"Add --method {sweep.method}."
            )
        if sweep.field in given or fields.count((sweep.method, sweep.field)) > 1 or (sweep.method and ("", sweep.field) in fields):
            raise ConfigError(
                f"{sweep.field} is given more than once.", "Give it once: as an override, or as one sweep with all its values."
            )
    options = {"seed": "--seeds", "name": "--name", "run.folder": "--folder"}
    for field in [*given, *(sweep.field for sweep in sweeps)]:
        if field in options:
            raise ConfigError(f"{field} is set for every run by the comparison.", f"Use {options[field]}.")


def component_problems(config: RunConfig) -> list[str]:
    """What the catalogue finds wrong with the components; found before hours are spent on the others."""
    from splitft import catalog

    found: list[str] = []
    for seam in sorted(_COMPONENTS & catalog.CATALOG.keys()):
        chosen: Component = getattr(config, seam)
        try:
            catalog.build(seam, chosen.name, chosen.fields)
        except ConfigError as problem:
            found += problem.problems or (str(problem),)
    return found


def _stems(paths: Sequence[Path]) -> list[str]:
    """The names of the files, with that of their folder where two are called alike."""
    stems = [path.stem for path in paths]
    return [f"{path.resolve().parent.name}-{stem}" if stems.count(stem) > 1 else stem for path, stem in zip(paths, stems, strict=True)]


def _short(swept: Sequence[str]) -> list[str]:
    """Swept fields by their last word, in full where two end alike."""
    pairs = [text.partition("=")[::2] for text in swept]
    ends = [field.rpartition(".")[2] for field, _ in pairs]
    return [f"{end if ends.count(end) == 1 else field}={value}" for (field, value), end in zip(pairs, ends, strict=True)]


def file_names(labels: Sequence[str]) -> list[str]:
    """A short name for each label that any file system takes; a digest tells apart what would be alike, upper and lower case included."""
    plain = [
        re.sub(r"[^A-Za-z0-9.]+", "_", label.replace(" ", "-space-")).replace("_space_", "-").strip("._-") or "variant" for label in labels
    ]
    folded = [name[:LONGEST_NAME].lower() for name in plain]
    names: list[str] = []
    for label, name, key in zip(labels, plain, folded, strict=True):
        digest = hashlib.sha256(label.encode()).hexdigest()[:8]
        names.append(name if folded.count(key) == 1 and len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{digest}")
    return names
