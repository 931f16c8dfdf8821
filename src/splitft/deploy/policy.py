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

from splitft.config import Component, RunConfig
from splitft.config_checks import problems_of, shown
from splitft.config_fields import Count, CountOrZero, NotNegative, Section
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
        0.0, description="Least noise on activations. No codec of this version adds any, so more than 0 refuses every server."
    )
    gradient_norm_limit: NotNegative = Field(
        1e6, description="Largest L2 norm of a received gradient, of one token; 0: any finite one. Absurd gradients steer a client."
    )
    adapter_norm_limit: NotNegative = Field(1e6, description="Largest L2 norm of received adapters, all together; 0: any finite one.")


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
    if policy.noise_floor > 0:
        raise _refusal("noise_floor", "activations without noise", f"noise of {policy.noise_floor:g} or more, which no codec offers yet")


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


def check_score(policy: ClientPolicy, start: ScoreStart) -> None:
    """Raise PolicyError unless a measurement is within the policy: held-out rows leave at the same cut as training rows."""
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
