"""What a client allows, whatever the server says: a TOML file of the client's own, and the checks that hold every order against it.

Each refusal is a PolicyError: the field, what was asked, what is allowed, what to do. A refused order is not carried out in part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from splitft.compress.base import Codec
from splitft.compress.noise import noise_in
from splitft.config import Component, RunConfig
from splitft.config_checks import problems_of, shown
from splitft.config_fields import Count, CountOrZero, NotNegative, Section
from splitft.config_secure import SecureAggregationSection
from splitft.errors import ConfigError, PolicyError
from splitft.messages import RoundStart, ScoreStart
from splitft.toml import read_toml

Names = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=100)]


class ClientPolicy(Section):
    """A client's policy file. Everything has a default; a limit of 0 is none unless it says otherwise."""

    minimum_cut: Count = Field(1, description="Fewest blocks that must stay on this client: a shallow cut is easier to read back.")
    maximum_cut: CountOrZero = Field(0, description="Most blocks this client computes in front of the cut; 0: any number.")
    labels: Literal["any", "client"] = Field(
        "any", description='"client": the labels, which are the text, must not leave; "any": they may.'
    )
    uplink_codecs: Names = Field(
        default_factory=list, description="Codecs allowed for what leaves at the cut, all stages counted; empty: any."
    )
    adapter_codecs: Names = Field(
        default_factory=list, description="Codecs allowed for adapters, both ways, all stages counted; empty: any."
    )
    maximum_rounds: CountOrZero = Field(10_000, description="Most rounds of a run; 0: any number.")
    maximum_local_steps: CountOrZero = Field(10_000, description="Most optimizer steps of a round; 0: any number.")
    maximum_step_rows: CountOrZero = Field(65_536, description="Most rows behind one optimizer step; 0: any number.")
    maximum_model_mb: CountOrZero = Field(0, description="Most megabytes of base model kept on this disk; 0: what is free.")
    maximum_memory_mb: CountOrZero = Field(0, description="Most megabytes of memory offered to the server; 0: half of what is free.")
    base_model: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = Field("", description="Digest of the only base model; empty: any.")
    server_fingerprint: Annotated[str, Field(pattern=r"^([0-9A-Fa-f]{2}(:?[0-9A-Fa-f]{2}){31})?$")] = Field(
        "", description="SHA-256 of the only certificate the server may show; empty: any that the federation's authority has signed."
    )
    noise_floor: NotNegative = Field(
        0.0,
        description="Least noise on what leaves at the cuts, in root mean squares of a row (codec noise); measured rows leave "
        "without: more than 0 refuses to measure, and wants labels to be forbidden too.",
    )
    least_bucket_tokens: CountOrZero = Field(0, description="Rows must be lengthened to multiples of so many tokens or more; 0: need not.")
    secure_aggregation: Literal["any", "required"] = Field(
        "any", description='"required": this client\'s adapters must be summed behind masks, never sent; "any": as the server says.'
    )
    least_owners: CountOrZero = Field(
        0,
        description="Fewest clients, itself counted, that its adapters may be summed among (with secure_aggregation required); 0: any.",
    )
    least_threshold: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = Field(
        0.0, description="Least share of those clients that opening their sum must take; 0: what the server announces, over a half."
    )
    peers: Names = Field(
        default_factory=list, description="Names of the only clients it shares a sum with (with secure_aggregation required); empty: any."
    )
    gradient_norm_limit: NotNegative = Field(
        1e6, description="Largest L2 norm of a received gradient, of one token; 0: any finite one. Absurd gradients steer a client."
    )
    adapter_norm_limit: NotNegative = Field(1e6, description="Largest L2 norm of received adapters, all together; 0: any finite one.")


# Fields that say how a sum must be hidden.
SEALED = ("least_owners", "least_threshold", "peers")
_ALLOWED = {"string_pattern_mismatch": "must be 64 hexadecimal digits (a SHA-256), or empty", "list_type": "must be a list of names"}


def load_policy(path: Path | None) -> ClientPolicy:
    """The policy in a TOML file; the defaults if None. Raises ConfigError with every problem."""
    return ClientPolicy() if path is None else parse_policy(read_toml(path))


def parse_policy(values: Mapping[str, Any]) -> ClientPolicy:
    """A policy from its fields. Raises ConfigError with every problem: a policy with a fault in it protects nobody."""
    try:
        policy = ClientPolicy.model_validate(dict(values))
    except ValidationError as error:
        problems = [problem.text for problem in problems_of(error, ClientPolicy)]
        for index, details in enumerate(error.errors(include_url=False)):
            if details["type"] in _ALLOWED:
                name = ".".join(map(str, details["loc"]))
                problems[index] = f"{name} = {shown(details['input'])}: {_ALLOWED[details['type']]}."
        raise _faulty(problems) from error
    if policy.maximum_cut and policy.maximum_cut < policy.minimum_cut:
        raise _faulty([f"maximum_cut = {policy.maximum_cut}: must be at least minimum_cut = {policy.minimum_cut}, or 0."])
    if policy.secure_aggregation != "required" and (idle := [name for name in SEALED if getattr(policy, name)]):
        raise _faulty([f'{name}: needs secure_aggregation = "required"; a server could do without any.' for name in idle])
    if policy.noise_floor > 0 and policy.labels != "client":
        raise _faulty(['noise_floor: needs labels = "client"; labels are the text, and there is no noise on them.'])
    return policy


def _faulty(problems: list[str]) -> ConfigError:
    count = len(problems)
    return ConfigError(
        f"The client's policy has {count} problem{'s' if count != 1 else ''}.", "docs/deploy.md lists every field.", tuple(problems)
    )


def _refusal(field: str, asked: str, allowed: str) -> PolicyError:
    return PolicyError(
        f"the server asks for {asked}; this client's policy allows {allowed} ({field}).",
        f"change {field} in the policy file if you agree, or talk to the server's operator.",
    )


def _at_most(field: str, asked: int, limit: int, what: str) -> None:
    if limit and asked > limit:
        raise _refusal(field, f"{asked} {what}", f"at most {limit}")


def check_server(policy: ClientPolicy, fingerprint: str) -> None:
    """Raise PolicyError unless the server may show the certificate with this SHA-256 (empty: it has shown none)."""
    if policy.server_fingerprint and _plain(fingerprint) != _plain(policy.server_fingerprint):
        raise _refusal("server_fingerprint", f"trust in the certificate {fingerprint or '(none)'}", f"only {policy.server_fingerprint}")


def _plain(fingerprint: str) -> str:
    return fingerprint.replace(":", "").lower()


def check_welcome(policy: ClientPolicy, config: RunConfig, model: str, fingerprint: str = "") -> None:
    """Raise PolicyError unless the run that a server announces, on this base model, is within the policy.

    `fingerprint` is the SHA-256 of the certificate the server has shown.
    """
    check_server(policy, fingerprint)
    if policy.base_model and model != policy.base_model:
        raise _refusal("base_model", f"the base model {model[:80]}", f"only {policy.base_model}")
    split, train = config.split, config.train
    if policy.labels == "client" and split.labels != "client":
        raise _refusal("labels", f"the labels (split.labels = {split.labels})", "no labels to leave")
    if split.maximum_cut and split.maximum_cut < policy.minimum_cut:
        raise _refusal("minimum_cut", f"at most {split.maximum_cut} blocks on the client", f"no fewer than {policy.minimum_cut}")
    _at_most("maximum_cut", split.minimum_cut, policy.maximum_cut, "blocks on the client or more")
    _at_most("maximum_rounds", config.rounds, policy.maximum_rounds, "rounds")
    _at_most("maximum_local_steps", train.local_steps, policy.maximum_local_steps, "local steps a round")
    _at_most("maximum_step_rows", train.batch_size * train.gradient_accumulation, policy.maximum_step_rows, "rows a step")
    _check_codecs("uplink_codecs", policy.uplink_codecs, _leaving(config))
    _check_codecs("adapter_codecs", policy.adapter_codecs, (("adapter_uplink", config.adapter_uplink), _adapter_downlink(config)))
    if policy.least_bucket_tokens and config.tokens.bucket_tokens < policy.least_bucket_tokens:
        asked = f"rows in buckets of {config.tokens.bucket_tokens} tokens (tokens.bucket_tokens)"
        raise _refusal("least_bucket_tokens", asked, f"{policy.least_bucket_tokens} or more")
    if policy.secure_aggregation == "required":
        _check_sealing(policy, config.secure_aggregation)


def _check_sealing(policy: ClientPolicy, section: SecureAggregationSection) -> None:
    """What a run announces of its secure aggregation; what comes in a round is held against it again (deploy/sealing.py)."""
    if not section.enabled:
        raise _refusal("secure_aggregation", "adapters in the clear", "a sum behind masks only")
    if section.minimum < policy.least_owners:
        raise _refusal("least_owners", f"adapters hidden among {section.minimum} clients", f"{policy.least_owners} or more")
    if announced_share(section) < policy.least_threshold:
        asked = f"a sum that {announced_share(section):.0%} of the clients can open"
        raise _refusal("least_threshold", asked, f"{policy.least_threshold:.0%} or more")


def announced_share(section: SecureAggregationSection) -> float:
    """The share of the clients that opening a sum takes at least: two thirds where the run says nothing else."""
    return section.threshold or 2 / 3


def check_noise(policy: ClientPolicy, leaving: Mapping[str, Codec], width: int) -> None:
    """Raise PolicyError unless every codec of what leaves at the cuts, rows of `width` channels, adds as much noise as the policy wants."""
    for where, codec in leaving.items() if policy.noise_floor > 0 else ():
        noise = noise_in(codec)
        found = 0.0 if noise is None else noise.in_units_of_rms(width)
        if found < policy.noise_floor:
            raise _refusal("noise_floor", f"noise of {found:g} rms on what leaves ({where})", f"{policy.noise_floor:g} or more")


def _leaving(config: RunConfig) -> Iterator[tuple[str, Component]]:
    """The codecs of what a client sends at its cuts. A U-shape's gradients at the exit leave, too; "same" is the downlink's codec."""
    yield "uplink", config.uplink
    if config.split.labels == "client":
        same = config.exit_uplink.name == "same"
        yield ("downlink", config.downlink) if same else ("exit_uplink", config.exit_uplink)


def _adapter_downlink(config: RunConfig) -> tuple[str, Component]:
    same = config.adapter_downlink.name == "same"
    return ("adapter_uplink", config.adapter_uplink) if same else ("adapter_downlink", config.adapter_downlink)


def _check_codecs(field: str, allowed: list[str], used: Iterable[tuple[str, Component]]) -> None:
    if not allowed:
        return
    for where, component in used:
        for name in (component.name, *_inside(component.fields)):
            if name not in allowed:
                raise _refusal(field, f"the codec {name} ({where})", ", ".join(allowed))


def _inside(value: object, key: str = "") -> Iterator[str]:
    """Names of the codecs inside a codec: tables with a name, and names given as `inner`."""
    if isinstance(value, Mapping):
        for inner_key, item in value.items():
            if inner_key == "name" and key:
                yield str(item)
            else:
                yield from _inside(item, inner_key)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _inside(item, key)
    elif key == "inner":
        yield str(value)


def check_round(policy: ClientPolicy, start: RoundStart) -> None:
    """Raise PolicyError unless a round's order is within the policy. What the server announced at the door does not count here."""
    if start.cut < policy.minimum_cut:
        raise _refusal("minimum_cut", f"a cut behind block {start.cut}", f"no fewer than {policy.minimum_cut} blocks in front of it")
    _at_most("maximum_cut", start.cut, policy.maximum_cut, "blocks in front of the cut")
    if policy.labels == "client" and not start.exit_on_client:
        raise _refusal("labels", "the labels (the exit on the server)", "no labels to leave")
    _at_most("maximum_rounds", start.round, policy.maximum_rounds, "rounds")
    _at_most("maximum_local_steps", start.local_steps, policy.maximum_local_steps, "local steps")
    _at_most("maximum_step_rows", start.batch_size * start.gradient_accumulation, policy.maximum_step_rows, "rows a step")
    if policy.secure_aggregation == "required" and start.upload:
        raise _refusal("secure_aggregation", "adapters in the clear at the end of a round", "a sum behind masks only")


def check_score(policy: ClientPolicy, start: ScoreStart) -> None:
    """Raise PolicyError unless a measurement is within the policy: held-out rows leave at the same cut as training rows."""
    if policy.noise_floor > 0:
        raise _refusal("noise_floor", "held-out rows, which are measured without codecs", "nothing to leave without noise")
    if start.cut < policy.minimum_cut:
        raise _refusal(
            "minimum_cut", f"a measurement behind block {start.cut}", f"no fewer than {policy.minimum_cut} blocks in front of it"
        )
    _at_most("maximum_cut", start.cut, policy.maximum_cut, "blocks in front of the cut")
    if policy.labels == "client" and not start.exit_on_client:
        raise _refusal("labels", "the labels of held-out rows (the exit on the server)", "no labels to leave")
    _at_most("maximum_rounds", start.round, policy.maximum_rounds, "rounds")
    _at_most("maximum_step_rows", start.batch_size, policy.maximum_step_rows, "rows of a measured batch")


def check_gradient(policy: ClientPolicy, gradient: Tensor) -> None:
    """Raise PolicyError unless a received gradient [.. d] is finite and no token's is longer than the limit."""
    _check_norm("gradient_norm_limit", policy.gradient_norm_limit, gradient, "a gradient", "of one token")


def check_adapters(policy: ClientPolicy, vector: Tensor) -> None:
    """Raise PolicyError unless received adapters are finite and, as one vector, not longer than the limit."""
    _check_norm("adapter_norm_limit", policy.adapter_norm_limit, vector.reshape(1, -1), "adapters", "all together")


def _check_norm(field: str, limit: float, values: Tensor, what: str, of: str) -> None:
    if values.numel() == 0:
        return
    largest = float(torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32).max())
    if not math.isfinite(largest):  # or only too large for float32; float64 takes twenty times as long
        largest = float(torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64).max())
    if not math.isfinite(largest):
        raise _refusal(field, f"training with {what} that are not finite", "finite values only")
    if limit and largest > limit:
        raise _refusal(field, f"training with {what} of norm {largest:.3g} ({of})", f"{limit:g}")
