"""The gateway's socket, bound by ``up`` itself.

So a port in use is an error before anything starts, a port of 0 is known, and a gateway that is restarted keeps its
port: who connects meanwhile waits in the queue instead of being refused.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import Final

from promptmill.errors import ConfigError, PromptmillError
from promptmill.settings import LOOPBACK, Settings

_BACKLOG: Final = 2048


def check_exposure(settings: Settings) -> None:
    """Raises ConfigError where other machines could reach the gateway and no API key is set, or none can be read."""
    if is_loopback(settings.host) or settings.keys_by_user():
        return
    raise ConfigError(
        f"host {settings.host}: other machines could use this without a key; set api_key (or api_keys), or listen on "
        "127.0.0.1",
        field="host",
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises
    ------
    PromptmillError
        ``port_in_use``.
    ConfigError
        This machine has no such address, or the port is not ours to take.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as err:
        raise ConfigError(f"host {host!r} is not known: {err}", field="host") from None
    # IPv4 first: it is what "localhost" means to most clients.
    family, kind, protocol, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as err:
        listener.close()
        if err.errno == errno.EADDRINUSE:
            raise PromptmillError(
                f"port {port} on {host} is in use: stop what listens there, or choose another with --port "
                "(0 takes any free one)",
                code="port_in_use",
                field="port",
            ) from None
        raise ConfigError(f"cannot listen on {host} port {port}: {err.strerror}", field="host") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """An address under which this machine reaches the socket: a wildcard address is no destination."""
    host, port = listener.getsockname()[:2]
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host in LOOPBACK:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
