"""The configuration of a run: its schema (`RunConfig`), and `load_config`, which reads a TOML file plus dotted overrides.

Every field carries its own description; `docs/configuration.md` is written from them. The seams (data, partition, policy,
uplink, downlink, aggregator) are a name and that component's own fields, checked later by the catalogue that knows the component.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from splitft.config_bottleneck import BottleneckSection
from splitft.config_checks import Problem, cross_check, plain_fault, problems_of
from splitft.config_federation import FederationSection
from splitft.config_fields import Count, CountOrZero, Decay, NotNegative, Section, Share
from splitft.config_secure import SecureAggregationSection
from splitft.config_tokens import TokensSection
from splitft.config_values import Values, merge_overrides, resolve_paths, without
from splitft.errors import ConfigError
from splitft.toml import read_toml, write_toml

REMEDY = "docs/configuration.md lists every field."


def _lora_targets(value: object) -> object:
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    if isinstance(value, str) and value in ("default", "all"):
        return value
    raise ValueError('must be "default", "all" or a list of module names such as ["attn.c_attn"]')


def _strings(value: object) -> object:
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise ValueError('must be a list of one or more names such as ["laptop"]')


class Component(BaseModel):
    """A method by name and its own fields. In the file: `[policy]` with `name = "fixed"` beside the fields, or just `policy = "fixed"`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1)
    fields: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: object) -> object:
        if isinstance(values, str):
            return {"name": values}
        if not isinstance(values, Mapping) or (set(values) == {"name", "fields"} and isinstance(values["fields"], Mapping)):
            return values
        return {"name": values.get("name", ""), "fields": {key: value for key, value in values.items() if key != "name"}}

    @field_validator("fields")
    @classmethod
    def _plain(cls, fields: dict[str, Any]) -> dict[str, Any]:
        if fault := plain_fault(fields):
            raise ValueError(fault)
        return fields

    @model_serializer
    def _spread(self) -> dict[str, Any]:
        return {"name": self.name, **self.fields}


def _component(name: str, description: str, **fields: Any) -> Any:
    return Field(default_factory=lambda: Component(name=name, fields=dict(fields)), description=description)


class ModelSection(Section):
    """The base model; its weights stay frozen."""

    path: str = Field("embedded", min_length=1, description='Folder of a Hugging Face checkpoint, name on the hub, or "embedded".')
    revision: str = Field("", description="Branch, tag or commit on the hub; empty is the newest.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description='Type of the frozen weights; "auto": bfloat16 where the hardware multiplies it, else float32. Adapters: float32.',
    )
    attention: Literal["sdpa", "eager"] = Field("sdpa", description="Attention implementation of transformers.")
    device_map: Literal["", "auto", "balanced", "sequential"] = Field(
        "",
        description="Spreads the blocks of a large model over the machine's GPUs (accelerate's device maps); empty: one device holds all.",
    )
    self_check: bool = Field(
        True, description="Compare split with unsplit on a shrunken copy of the model at load time and refuse the model on any difference."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute blocks in the backward pass: less memory, about a third more time.")


class LoraSection(Section):
    """The trained adapters (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=4096)] = Field(8, description="Rank of the adapters.")
    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(16.0, description="The update is scaled by alpha / rank.")
    targets: Annotated[Literal["default", "all"] | tuple[str, ...], BeforeValidator(_lora_targets)] = Field(
        "default",
        description='Adapted projections of a block: "default" (those of the attention), "all", or a list of names. '
        "Routers and experts of a mixture are left out.",
    )
    adapter: str = Field(
        "", description="Folder of a PEFT adapter to start from (its own rank, alpha and modules count then); empty starts from zero."
    )


class ClientsSection(Section):
    """Who takes part, and on what devices."""

    count: CountOrZero = Field(
        5, description="Number of clients, in a federation of seats; 0 makes one per natural owner (partitions by_column and files)."
    )
    profiles: Annotated[tuple[str, ...], BeforeValidator(_strings)] = Field(
        ("laptop",), description="Device profiles: one for all clients, or one per client."
    )
    profiles_file: str = Field("", description="TOML file with profiles of your own; empty uses the presets.")
    server_profile: str = Field("workstation-gpu", min_length=1, description="Device profile of the server.")
    participation: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = Field(
        1.0, description="Share of the clients drawn for each round."
    )
    minimum: Count = Field(1, description="Fewest participants of a round.")
    fleet: str = Field(
        "",
        description="Fleet preset (uniform, two_tier, long_tail, cross_silo) or TOML file that draws every client's device; "
        "empty takes clients.profiles.",
    )
    availability: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = Field(
        1.0, description="Chance that a client can be drawn for a round, beside what its fleet says."
    )
    dropout: Share = Field(0.0, description="Chance that a participant is lost in the middle of a round, beside what its fleet says.")
    speed_jitter: Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)] = Field(
        0.0, description="Spread of a device's speed and link from round to round (sigma of a log-normal factor), beside its fleet's."
    )
    deadline_s: NotNegative = Field(
        0.0, description="Seconds after which a round no longer waits for stragglers (virtual ones, in a federation real ones); 0: all."
    )
    quorum: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = Field(
        0.5, description="Share of the participants whose updates a round needs before its deadline may end it."
    )
    late: Literal["partial", "drop"] = Field(
        "partial",
        description='At the deadline the finished steps of a straggler count, weighted by what was trained ("partial"), or none ("drop").',
    )
    buffer: CountOrZero = Field(
        0, description="Asynchronous aggregation: updates merged at a time while the others go on; 0 keeps synchronous rounds."
    )
    staleness: NotNegative = Field(
        0.5, description="Asynchronous aggregation: an update that is s versions old counts (1 + s) to the minus this power."
    )
    fetch_blocks: bool = Field(
        True, description="Blocks a client has not had before are sent by the server when its cut deepens, and counted; false: it has all."
    )


class SplitSection(Section):
    """Where the model is cut besides the policy's cut."""

    labels: Literal["server", "client"] = Field(
        "server", description='Who holds the labels and computes the loss; "client" is the U-shape (final norm and LM head on the client).'
    )
    server: Literal["per_client", "shared", "alternating", "sequential", "unaveraged"] = Field(
        "per_client",
        description="Whose adapters the server's blocks have. \"per_client\": each client's own. One set for all, stepped with all batches "
        'together ("shared"), after every batch, clients in turn ("alternating"), or client after client ("sequential"). '
        "\"unaveraged\": each client's own, averaged, while the clients' own parts never are.",
    )
    minimum_cut: Count = Field(1, description="Fewest blocks any policy leaves on a client: a shallow cut is easier to read back.")
    maximum_cut: CountOrZero = Field(0, description="Most blocks any policy puts on a client; 0: all.")
    max_leak: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)] = Field(
        1.0,
        description="Largest share of a client's tokens or labels that informed attackers may recover at a cut, by the upper end of the "
        '95 % interval, measured before the run begins; needs labels = "client" (docs/privacy.md); 1 allows any.',
    )
    tail_blocks: CountOrZero = Field(0, description='Last blocks kept on the client behind the server; needs labels = "client".')


class NetworkSection(Section):
    """What the virtual clock assumes of the server and the network between."""

    server_slots: Annotated[int, Field(ge=1, le=4096)] = Field(1, description="Steps the server computes side by side.")
    shared_link: bool = Field(
        False, description="All transfers share the server's own link (the rates of clients.server_profile); false: it is wide enough."
    )
    downlink_order: Literal["together", "longest_first"] = Field(
        "together",
        description='Over a shared link: all downlink transfers "together", or one at a time at full rate, the client with the most work '
        'left first ("longest_first": arXiv 2511.15404).',
    )
    pipeline: bool = Field(
        False, description="The micro-batches of an optimizer step overlap: front, transfer and back work at the same time."
    )


class TrainSection(Section):
    """Local training: AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), as the Hugging Face trainer has it."""

    local_steps: Count = Field(10, description="Optimizer steps of each participant in a round.")
    batch_size: Count = Field(4, description="Rows of a batch.")
    gradient_accumulation: Count = Field(1, description="Batches behind one optimizer step.")
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)] = Field(1e-3, description="Highest learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="Course of the rate after warm-up, over the whole run.")
    warmup_steps: CountOrZero = Field(0, description="Steps over which the rate rises from zero.")
    weight_decay: NotNegative = Field(0.0, description="Decoupled weight decay.")
    clip_norm: NotNegative = Field(1.0, description="Largest gradient norm over front and back together; 0 turns clipping off.")
    beta1: Decay = Field(0.9, description="Decay of AdamW's first moment.")
    beta2: Decay = Field(0.999, description="Decay of AdamW's second moment.")
    epsilon: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Field(1e-8, description="Added to AdamW's denominator.")
    moments: Literal["reset", "keep"] = Field("reset", description="What a round's start does to a client's optimizer moments.")


class EvaluateSection(Section):
    """When and how the held-out rows are measured; always before the first round and after the last."""

    every_rounds: Count = Field(1, description="Rounds between evaluations.")
    batch_size: Count = Field(8, description="Rows of an evaluation batch; more of shorter rows, for as many tokens.")
    max_rows: CountOrZero = Field(0, description="Most held-out rows of each client and of the common slice; 0 takes all.")
    probe_rows: Count = Field(
        4, description="Training rows that clients in turn send uncompressed each round, for a controller that asks for a probe."
    )


class EngineSection(Section):
    """What computes."""

    name: Literal["cohort", "workers", "ray"] = Field(
        "cohort",
        description='"cohort" computes many clients in one batched pass; "ray" spreads cohorts over the processes and machines of a Ray '
        'cluster (extra: ray); "workers" lets client and server objects exchange messages.',
    )
    address: str = Field(
        "", description='Ray to run on: "auto", "host:port" or "ray://host:port"; empty starts one on this machine for the run.'
    )
    actors: Annotated[int, Field(ge=0, le=100_000)] = Field(
        0, description="Processes that train under Ray; 0 takes one per core or per engine.threads cores, at most one per cohort."
    )
    cohort_size: CountOrZero = Field(
        0,
        description="Clients in one pass; 0 takes as many as fit memory_mb and have about 4,096 tokens together on a CPU, 65,536 on a GPU.",
    )
    memory_mb: CountOrZero = Field(
        0,
        description="Memory that training may take beside the base model, in megabytes; it bounds the clients in a pass. "
        "0: half of what is free; give a number where equal runs must agree to the last bit on a machine short of memory.",
    )
    store: Literal["memory", "disk"] = Field(
        "memory",
        description='Where clients\' adapters and moments lie while others train: in "memory", or on "disk", in memory-mapped files in the '
        "run folder that are removed at the end. The numbers are the same.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description='Device; "auto" takes CUDA, then MPS, then the processor.')
    threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        0, description="Threads of one process; 0 takes the cores this process may use (under Ray: an actor's share of the cores)."
    )
    compile: bool = Field(
        False,
        description="Compile every block with torch.compile: some 20 s at the start, and measured not to pay on CPUs (docs/scaling.md).",
    )
    deterministic: bool = Field(
        True,
        description="Bit-for-bit repeatable: every worker gets a server pass of its own, and a run resumes only with as many threads. "
        "Under Ray adapters are added in the order of one process; false adds them as a tree.",
    )


class RunSection(Section):
    """Where results go."""

    folder: str = Field("runs", min_length=1, description="Folder of the run folders, seen from where the command is started.")
    keep_checkpoints: Count = Field(2, description="Newest checkpoints kept.")
    tensorboard: bool = Field(False, description="Also write TensorBoard events (extra: tensorboard).")


class RunConfig(Section):
    """Everything a run depends on. Build it with `load_config` or `parse_config`, which explain every fault at once."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="Name of the run and of its folder: letters, digits, . _ -"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Seed of every random stream.")
    rounds: Count = Field(5, description="Rounds of plan, train, aggregate, evaluate.")
    model: ModelSection = Field(default_factory=ModelSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    data: Component = _component("python_docs", "Where the documents come from.")
    tokens: TokensSection = Field(default_factory=TokensSection)
    partition: Component = _component("length_dirichlet", "How documents are dealt to clients.", alpha=0.5)
    clients: ClientsSection = Field(default_factory=ClientsSection)
    policy: Component = _component("fixed", "How many blocks each client holds.")
    ranks: Component = _component("uniform", "How large each adapter's rank is, up to lora.rank.")
    work: Component = _component("equal", "How many local steps each participant takes, train.local_steps on average.")
    split: SplitSection = Field(default_factory=SplitSection)
    bottleneck: BottleneckSection = Field(default_factory=BottleneckSection)
    network: NetworkSection = Field(default_factory=NetworkSection)
    train: TrainSection = Field(default_factory=TrainSection)
    uplink: Component = _component("cast", "Codec of what clients send at the cut.", dtype="bfloat16")
    downlink: Component = _component("cast", "Codec of what the server sends at the cut.", dtype="bfloat16")
    exit_downlink: Component = _component("same", 'Codec of a U-shape\'s activations at the exit; "same": as uplink.')
    exit_uplink: Component = _component("same", 'Codec of a U-shape\'s gradients at the exit; "same": as downlink.')
    adapter_uplink: Component = _component(
        "identity", "Codec of the adapters clients send; one that loses something is given their change since the round began."
    )
    adapter_downlink: Component = _component(
        "same", 'Codec of the adapters the server sends, given the change since the client last had them; "same": as adapter_uplink.'
    )
    controller: Component = _component("fixed", "How coarse the codecs are from round to round, within a budget of quality.")
    aggregator: Component = _component("average", "How updates become the next global adapters.")
    synchronisation: Component = _component("every_round", "Whether a round ends with an aggregation.")
    secure_aggregation: SecureAggregationSection = Field(default_factory=SecureAggregationSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    federation: FederationSection = Field(default_factory=FederationSection)
    run: RunSection = Field(default_factory=RunSection)

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        if problems := tuple(cross_check(self)):
            raise ConfigError("The configuration contradicts itself.", REMEDY, tuple(problem.text for problem in problems))
        return self

    def to_toml(self) -> str:
        """The resolved configuration; `load_config` reads it back as an equal value."""
        return write_toml(self.model_dump(mode="json"))


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of `path` (the defaults if None) with `overrides` such as `train.learning_rate=1e-4` applied.

    Paths in the file are seen from its folder, paths in overrides from the working folder; both come out absolute. An override that
    changes a component's name drops the fields of the component it replaces. Raises one ConfigError with every problem.
    """
    values: Values = {} if path is None else read_toml(path)
    if path is not None:
        resolve_paths(values, path.resolve().parent)
    return parse_config(values, overrides)


def parse_config(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A configuration from nested mappings (a `model_dump` too), checked as `load_config` checks a file."""
    merged, problems = merge_overrides(values, overrides, Path.cwd(), _default_components())
    config, found = _validate(merged)
    problems = [*problems, *found]
    if problems or config is None:
        count = len(problems)
        raise ConfigError(
            f"The configuration has {count} problem{'s' if count != 1 else ''}.", REMEDY, tuple(problem.text for problem in problems)
        )
    return config


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with dotted overrides applied."""
    return parse_config(config.model_dump(mode="json"), overrides)


def _default_components() -> dict[str, dict[str, Any]]:
    defaults = RunConfig()
    return {name: getattr(defaults, name).model_dump() for name, field in RunConfig.model_fields.items() if field.annotation is Component}


def _validate(values: Values) -> tuple[RunConfig | None, list[Problem]]:
    """The configuration, or all that is wrong with it: faulty fields are set aside so that the rest can still be cross-checked."""
    try:
        return RunConfig(**values), []
    except ConfigError:
        found: list[Problem] = []
    except ValidationError as error:
        found = problems_of(error, RunConfig)
    faulty = {problem.path for problem in found}
    partial = RunConfig.model_construct(**_sections(without(values, faulty)))
    return None, [*found, *(problem for problem in cross_check(partial) if not faulty & {problem.path, *problem.others})]


def _sections(values: Values) -> dict[str, Any]:
    """Each section of `values` validated on its own, so that a whole with faults can be looked at; a hopeless one keeps its default."""
    built: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        kind = field.annotation
        if name in values and isinstance(kind, type) and issubclass(kind, BaseModel):
            with contextlib.suppress(ValidationError):
                built[name] = kind.model_validate(values[name])
        elif name in values:
            built[name] = values[name]
    return built
