"""What a client makes of the server's welcome: policy first, then the tokenizer, its own rows, and its part of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from splitft.apps.assemble import build_components, choose_device, start_adapter, train_settings
from splitft.apps.capacity import SHARE, available_bytes
from splitft.apps.executors import in_slots
from splitft.apps.server_setup import SHARED_SECTIONS
from splitft.compress.noise import noise_in
from splitft.config import Component, RunConfig, parse_config
from splitft.data.base import ClientData, Source
from splitft.data.federate import own_share
from splitft.data.order import BatchOrder
from splitft.deploy.cache import ModelCache
from splitft.deploy.certificates import read_certificate, read_key
from splitft.deploy.disk import read_private, write_atomically, write_private
from splitft.deploy.letters import MAX_LETTER_BYTES, Finished, Ready, Welcome
from splitft.deploy.parts import check_table, verify_local, wanted_parts
from splitft.deploy.policy import (
    ClientPolicy,
    announced_share,
    check_adapters,
    check_gradient,
    check_noise,
    check_round,
    check_score,
    check_welcome,
)
from splitft.deploy.sealing import Insider, Returned
from splitft.engine.settings import Federation
from splitft.errors import ConfigError, IdentityError, PolicyError, ProtocolError
from splitft.lora import Layout
from splitft.messages import RoundStart, ScoreStart
from splitft.models.anatomy import block_count
from splitft.models.attention import NAME, build_with, register, suited
from splitft.models.load import BUILDING, causal_class, load_model, load_model_config, load_tokenizer
from splitft.rng import fresh_bytes
from splitft.selfcheck import inspect_family
from splitft.split import SplitModel
from splitft.transport.tls import ClientTls

FetchBytes = Callable[[str, int], bytes]
Say = Callable[[str, dict[str, Any]], None]
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ADAPTER_LIMIT_BYTES = 4 << 30
MB = 1_000_000
# Beside the adapter: the memory that was measured at the first start; remove it to have it measured again.
MEMORY_FILE = "memory_bytes"
NOISE_KEY_FILE, DATA_KEY_FILE, KEY_BYTES = "noise.key", "data.key", 32


@dataclass
class ClientWorkshop:
    """Follows a server's configuration within the client's policy. `local` is a checkpoint of its own, verified by digest; `memory_mb` 0:
    half of what is free."""

    source: Callable[[], Source]
    policy: ClientPolicy
    cache: ModelCache
    device_name: str = "auto"
    local: Path | None = None
    memory_mb: int = 0
    name: str = "client"
    adapter_folder: Path = Path("adapter")
    say: Say = lambda event, facts: None
    server_fingerprint: str = ""
    tls: ClientTls | None = None
    settled: Welcome | None = None
    _split: SplitModel | None = None
    _held: tuple[frozenset[int], bool] = (frozenset(), False)
    _ready: Ready | None = None
    _known: dict[str, Any] = field(default_factory=dict)
    _returned: Returned | None = None

    def settle(self, welcome: Welcome, fetch: FetchBytes) -> Ready:
        """Everything that can be done before the first round. Raises PolicyError, ConfigError, DataError, ModelError, ResourceError."""
        with BUILDING:
            return self._settle(welcome, fetch)

    def _settle(self, welcome: Welcome, fetch: FetchBytes) -> Ready:
        if self._ready is not None and self.settled is not None and _same(self.settled, welcome):
            self.settled = welcome
            return self._ready
        config = read_config(welcome.config)
        check_table(welcome.parts, welcome.model)
        check_welcome(self.policy, config, welcome.model, self.server_fingerprint)
        self._hold_to(config)
        self.settled, self._split, self._held = welcome, None, (frozenset(), False)
        self.device = choose_device(self.device_name)
        self.config = config
        self.folder = self._provide([part.name for part in welcome.parts if part.name.startswith("file:")], fetch)
        self.base = load_model_config(str(self.folder))
        blocks = block_count(self.base)
        if config.split.minimum_cut > blocks or not 0 <= welcome.seat < 1_000_000:
            raise ProtocolError(f"seat {welcome.seat} of a model with {blocks} blocks.", "talk to the server's operator.")
        self.attention = suited(causal_class(self.base), self.base) if self._on_cpu_sdpa() else str(config.model.attention)
        self.anatomy = inspect_family(self.base, str(self.folder), self.attention, config.model.self_check)
        self.components = build_components(_with_one_cut(config) if config.secure_aggregation.enabled else config)
        self.settings = train_settings(config, self.components)
        if self._noisy():
            # Drawn from the run's seed, which the server knows, it could be taken off again.
            self.settings = replace(self.settings, secret=int.from_bytes(self._noise_key(), "big"))
        up, _, _, exit_up = self.settings.codecs
        leaving = {"uplink": up} | ({"exit_uplink": exit_up} if config.split.labels == "client" else {})
        check_noise(self.policy, leaving, config.bottleneck.channels or int(self.base.get_text_config().hidden_size))
        self.vocabulary = int(self.base.get_text_config().vocab_size)
        tokenizer = load_tokenizer(str(self.folder))
        self.say("reading", {})
        tokens = config.tokens
        self.data, digest = own_share(
            self.source().documents(),
            tokenizer,
            welcome.seat,
            self.name,
            config.seed,
            tokens.packing,
            tokens.block_tokens,
            tokens.held_out,
            self.vocabulary,
            tokens.bucket_tokens,
        )
        skeleton = self._skeleton()
        self.layout, self.start = start_adapter(config, skeleton)
        self.trained = self.components.aggregator.trained(self.layout)
        self._ready = Ready(
            rows=len(self.data.train),
            tokens=self.data.train.tokens,
            documents=self.data.documents,
            held_out_rows=len(self.data.held_out),
            data=hashlib.blake2b(bytes.fromhex(digest), key=self._data_key(), digest_size=32).hexdigest(),
            memory_bytes=self._memory_bytes(),
            device=self.device.type,
        )
        return self._ready

    def _hold_to(self, config: RunConfig) -> None:
        """Raise PolicyError for another configuration under noise: another seed makes other rows of a batch that has been counted."""
        if self._ready is not None and self.settled is not None and self._noisy() and config != read_config(self.settled.config):
            raise PolicyError(
                "the server's configuration is another than when this client came in, which has noise put on what it sends: with another "
                "seed or other batches its rows would be counted anew.",
                "start the client again if you agree to it.",
            )

    def _noisy(self) -> bool:
        """Whether the run that was settled puts noise on anything a client sends."""
        return any(noise_in(codec) is not None for codec in (*self.settings.codecs, self.settings.adapter_uplink))

    def _on_cpu_sdpa(self) -> bool:
        return self.device.type == "cpu" and self.config.model.attention == "sdpa"

    def _noise_key(self) -> bytes:
        """This client's own key for noise; kept, so that a round that is done again sends the same noise and not another sample of it."""
        return self._own_key(NOISE_KEY_FILE, "the key of this client's noise")

    def _data_key(self) -> bytes:
        """This client's own key for the digest of its text: of the text alone it would confirm a guess of all of it, and show who has the
        same. Kept, so that the server can tell a text that has changed; without it the same text counts as another."""
        return self._own_key(DATA_KEY_FILE, "the key of this client's digest of its text")

    def _own_key(self, name: str, what: str) -> bytes:
        """A secret in a file beside the adapter, drawn at its first use."""
        path = self.adapter_folder.with_name(name)
        if not path.is_file():
            write_private(path, fresh_bytes(KEY_BYTES))
        key = read_private(path, KEY_BYTES, what)
        if len(key) != KEY_BYTES:
            raise IdentityError(f"{what} at {path} has {len(key)} bytes; it needs {KEY_BYTES}.", "Remove it: a new one is made.")
        return key

    def _memory_bytes(self) -> int:
        """What is offered to the server. Measured once and kept, so that a client that is started again is given the same plans."""
        if self.memory_mb or self.policy.maximum_memory_mb:
            return min(one for one in (self.memory_mb, self.policy.maximum_memory_mb) if one) * MB
        kept = self.adapter_folder.with_name(MEMORY_FILE)
        with suppress(OSError, ValueError):
            return int(kept.read_text(encoding="utf-8"))
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else SHARE * available_bytes()
        write_atomically(kept, f"{int(free)}\n".encode())
        return int(free)

    def _provide(self, wanted: Sequence[str], fetch: FetchBytes) -> Path:
        """The folder with these parts of the model, from the client's own checkpoint if it has one, else from cache and server."""
        assert self.settled is not None
        table = self.settled.parts
        if self.local is not None:
            verify_local(self.local, table, wanted)
            return self.local
        return self.cache.provide(
            table, self.settled.model, wanted, fetch, lambda done, total: self.say("fetching", {"done": done, "total": total})
        )

    def _skeleton(self) -> SplitModel:
        """The whole model's structure without tensors: which projections there are, and so the columns of all adapters."""
        if self.attention == NAME:
            register()
        cls: Any = causal_class(self.base)
        with torch.device("meta"):
            model = build_with(lambda name: cls._from_config(self.base, attn_implementation=name, dtype=self._dtype()), self.attention)
        return in_slots(self.config, self.anatomy, model.eval())

    def _dtype(self) -> torch.dtype:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.config.model.dtype]

    def federation(self, seat: int, cut: int, tail_blocks: int, exit_on_client: bool, fetch: FetchBytes) -> Federation:
        """This client's blocks in slots; what it has already stays, what is missing is fetched."""
        assert self.settled is not None
        blocks = block_count(self.base)
        if not (1 <= cut <= blocks - tail_blocks and tail_blocks >= 0 and (exit_on_client or not tail_blocks)):
            raise ProtocolError(
                f"the server cuts a model of {blocks} blocks behind {cut}, with {tail_blocks} at the end.", "talk to its operator."
            )
        front, tail = range(cut), range(blocks - tail_blocks, blocks) if exit_on_client else range(0)
        needed = frozenset([*front, *tail])
        held, with_exit = self._held
        if self._split is None or not needed <= held or (exit_on_client and not with_exit):
            owned, needs_exit = sorted(needed | held), exit_on_client or with_exit
            folder = self._provide(wanted_parts(self.settled.parts, owned, needs_exit), fetch)
            self.say("loading", {"blocks": len(owned)})
            self._split = None  # the old part may go before the new one comes
            model = load_model(str(folder), self.base, self._dtype(), self.attention, owned, needs_exit)
            self._split = in_slots(self.config, self.anatomy, model.to(self.device), owned)
            self._held = (frozenset(owned), needs_exit)
        return self._federation(self._split, self.layout, seat)

    def _federation(self, split: SplitModel, layout: Layout, seat: int) -> Federation:
        data = ClientData(seat, self.name, self.data.documents, self.data.train, self.data.held_out)
        order = BatchOrder(len(data.train), self.settings.batch_size, self.config.seed, seat)
        # The engine finds a client by its number; the others' places are never looked at here.
        clients, orders = (data,) * (seat + 1), (order,) * (seat + 1)
        return Federation(split, layout, clients, orders, self.settings, self.vocabulary, self.device, self.start, self.trained)

    def limit_bytes(self) -> int:
        """Of a step's gradients or activations in any codec, a measured batch, or adapters with moments; and what is around them."""
        config, width = self.config, int(self.base.get_text_config().hidden_size)
        rows = max(config.train.batch_size, config.evaluate.batch_size)
        return max(rows * config.tokens.block_tokens * (5 * width + 16), 21 * self.layout.parameters) + MAX_LETTER_BYTES

    def check_round(self, start: RoundStart) -> None:
        """Hold a round's plan against the policy, and against what the server announced. Raises PolicyError or ProtocolError."""
        check_round(self.policy, start)
        split, train = self.config.split, self.config.train
        wrong = {
            "rounds": not 1 <= start.round <= self.config.rounds,
            "labels": start.exit_on_client != (split.labels == "client"),
            "tail_blocks": start.tail_blocks != split.tail_blocks,
            "rank": start.rank > max(entry.rank for entry in self.layout.entries),
            "clip_norm": start.clip_norm != train.clip_norm,
            "rates": any(rate > train.learning_rate * (1 + 1e-9) for rate in start.rates),
            "dial": (start.activations_dial, start.gradients_dial) != (1.0, 1.0),
            "upload": start.upload and self.config.secure_aggregation.enabled,
            "segments": start.segments != self.components.aggregator.segments,
        }
        if named := [name for name, is_wrong in wrong.items() if is_wrong]:
            raise ProtocolError(f"round {start.round} differs from what the server announced in {', '.join(named)}.", "ask its operator.")

    def check_score(self, start: ScoreStart) -> None:
        """Hold a measurement against the policy, and against what the server announced. Raises PolicyError or ProtocolError."""
        check_score(self.policy, start)
        if noise_in(self.settings.uplink) is not None:
            raise PolicyError(
                "the server asks for held-out rows, which are measured without the run's noise.",
                "its operator can set tokens.held_out = 0 and federation.held_out to a public text.",
            )
        if self.config.bottleneck.channels:
            raise PolicyError(
                "the server asks for held-out rows, which are measured without the run's bottleneck.",
                "its operator can set tokens.held_out = 0 and federation.held_out to a public text.",
            )
        split, evaluate = self.config.split, self.config.evaluate
        announced = (split.labels == "client", split.tail_blocks, evaluate.batch_size, evaluate.max_rows)
        asked = (start.exit_on_client, start.tail_blocks, start.batch_size, start.max_rows)
        if asked != announced or not 0 <= start.round <= self.config.rounds:
            raise ProtocolError(f"measurement {start.round} differs from what the server announced.", "ask its operator.")

    def insider(self, seat: int) -> Insider | None:
        """This client's standing in secure aggregation, anew for every round; None where the run has none. Raises IdentityError without a
        certificate."""
        self._returned = Returned() if self.config.secure_aggregation.enabled else None
        if self._returned is None:
            return None
        if self.tls is None:
            raise IdentityError("secure aggregation needs certificates, and this client has none.", "enrol: splitft enroll join")
        authority = read_certificate(self.tls.root_pem, "the authority's certificate")
        certificate = read_certificate(self.tls.certificate_pem)
        section, policy = self.config.secure_aggregation, self.policy
        threshold, owners = max(announced_share(section), policy.least_threshold), max(section.minimum, policy.least_owners)
        key = read_key(self.tls.key_pem, "the private key")
        return Insider(seat, certificate, key, authority, frozenset(policy.peers), threshold, owners, self._returned)

    def check_gradient(self, gradient: Tensor) -> None:
        """Hold a returned gradient against the policy; under secure aggregation also remember whether it was zero."""
        check_gradient(self.policy, gradient)
        if self._returned is not None:
            self._returned.note(gradient)

    def check_adapters(self, vector: Tensor) -> None:
        check_adapters(self.policy, vector)

    def keep_adapter(self, finished: Finished, fetch: FetchBytes) -> Path | None:
        """The joined adapter as stock PEFT reads it, in `adapter_folder`."""
        if not finished.adapter:
            return None
        self.adapter_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for part in finished.adapter:
            name = part.name.removeprefix("adapter:")
            if name not in ADAPTER_FILES or not 0 < part.size_bytes <= ADAPTER_LIMIT_BYTES:
                raise ProtocolError(f"the server offers {part.name[:80]!r} of {part.size_bytes} bytes as an adapter.", "do not use it.")
            data = bytearray()
            while len(data) < part.size_bytes:
                piece = fetch(part.sha256, len(data))
                if not piece or len(data) + len(piece) > part.size_bytes:
                    raise ProtocolError(f"{part.name} ended after {len(data)} of {part.size_bytes} bytes.", "start the client again.")
                data += piece
            if hashlib.sha256(data).hexdigest() != part.sha256:
                raise ProtocolError(f"{part.name} is not what the server promised.", "start the client again.")
            write_atomically(self.adapter_folder / name, bytes(data))
        return self.adapter_folder


def read_config(text: str) -> RunConfig:
    """The server's part of the configuration. Raises ConfigError or ProtocolError for anything it has no business to set."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ProtocolError(
            f"the server's configuration is no JSON: {problem}.", "run the same splitft version on both sides."
        ) from problem
    if not isinstance(values, dict) or (unknown := sorted(set(values) - set(SHARED_SECTIONS))):
        what = unknown[0] if isinstance(values, dict) else "no table"
        raise ProtocolError(f"the server's configuration sets {what!s:.60}, which is the client's own.", "update splitft on both sides.")
    model = values.get("model")
    if not isinstance(model, dict) or model.get("path") != "embedded" or model.get("dtype") not in ("float32", "bfloat16"):
        raise ProtocolError("the server's configuration names a model by path.", "update splitft on both sides.")
    if isinstance(values.get("lora"), dict) and values["lora"].get("adapter"):
        raise ProtocolError("the server's configuration names an adapter by path.", "update splitft on both sides.")
    try:
        return parse_config(values)
    except ConfigError as problem:
        raise ConfigError("The server's configuration cannot be followed by this version.", problem.remedy, problem.problems) from problem


def _with_one_cut(config: RunConfig) -> RunConfig:
    """Clients are not told the policy's cuts. What secure aggregation does not go with among them the server has checked, and what a
    client minds it looks at in every round: how many own a column (deploy/sealing.py), moments asked for (deploy/member.py)."""
    return config.model_copy(update={"policy": Component(name="fixed", fields={"cuts": [max(1, config.split.minimum_cut)]})})


def _same(one: Welcome, other: Welcome) -> bool:
    """Whether a client that comes back is told what it was told before."""
    return (one.run, one.seat, one.model, one.config) == (other.run, other.seat, other.model, other.config)
