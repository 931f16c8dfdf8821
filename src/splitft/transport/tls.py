"""Certificates of the transport: mutual TLS for both ends, and the gRPC options that both must agree on."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from splitft.errors import ConfigError
from splitft.transport.values import Limits, Timing

METADATA_BYTES = 8 << 10
STREAMS_PER_CONNECTION = 4
GRPC_MARGIN_BYTES = 4 << 10


@dataclass(frozen=True)
class ServerTls:
    """What a server shows and whom it believes: clients whose certificate `root_pem` has signed."""

    root_pem: bytes
    certificate_pem: bytes
    key_pem: bytes = field(repr=False)


@dataclass(frozen=True)
class ClientTls:
    """What a client shows and whom it believes. `server_name`: the name expected in the server's certificate, where it is not the host."""

    root_pem: bytes
    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    server_name: str = ""


def host_of(address: str) -> str:
    """The host of `host:port` or `[host]:port`."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach `address`."""
    host = host_of(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_plain_text(address: str) -> None:
    """Raise ConfigError unless `address` is loopback: nothing leaves a machine unencrypted."""
    if not is_loopback(address):
        raise ConfigError(
            f"{address} would be used without TLS; plain text is allowed on loopback only.", "Make certificates with `splitft enroll`."
        )


def shared_options(limits: Limits) -> list[tuple[str, int | str]]:
    """Options of both ends: bounded messages and metadata, no compression, no retries of gRPC's own."""
    message_bytes = limits.chunk_bytes + GRPC_MARGIN_BYTES
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),
        ("grpc.default_compression_algorithm", 0),
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.enable_retries", 0),
        # Signs of life are our own (they also tell what was received), so gRPC's stay off on both sides and never disagree.
        ("grpc.keepalive_time_ms", 2**31 - 1),
    ]


def server_options(limits: Limits, timing: Timing) -> list[tuple[str, int | str]]:
    """A handshake that does not end and a connection without a stream are cut after `connect_s`."""
    patience_ms = max(1, int(timing.connect_s * 1000))
    return [
        *shared_options(limits),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.server_handshake_timeout_ms", patience_ms),
        ("grpc.max_connection_idle_ms", patience_ms),
    ]


def client_options(address: str, tls: ClientTls | None, limits: Limits, timing: Timing) -> list[tuple[str, int | str]]:
    """Each link has a connection of its own, even where several links of one process go to one server."""
    options = [
        *shared_options(limits),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.min_reconnect_backoff_ms", max(100, int(timing.connect_s * 1000))),
    ]
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))
    if tls is not None and tls.server_name:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def server_credentials(grpc: Any, first: ServerTls, latest: Any) -> Any:
    """Credentials that ask every client for a certificate; `latest()` gives a newer ServerTls once, or None, at each handshake."""

    def configuration(tls: ServerTls) -> Any:
        return grpc.ssl_server_certificate_configuration([(tls.key_pem, tls.certificate_pem)], tls.root_pem)

    def fetch() -> Any:
        newer = latest()
        return None if newer is None else configuration(newer)

    return grpc.dynamic_ssl_server_credentials(configuration(first), fetch, require_client_authentication=True)


def client_credentials(grpc: Any, tls: ClientTls) -> Any:
    """Credentials of one client."""
    return grpc.ssl_channel_credentials(tls.root_pem, tls.key_pem, tls.certificate_pem)
