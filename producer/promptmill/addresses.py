"""The addresses of stores and brokers: one Redis, a Redis Cluster, or a Redis behind Sentinel.

============================================================  =======================================================
``redis://[user:password@]host[:port][/db]``, ``rediss://``,  one server
``unix://path``
``redis+cluster://[user:password@]host:port[,host:port…]``    a Redis Cluster: any of its nodes, the others are found
``redis+sentinel://[user:password@]host:port[,…]/name[/db]``  the primary that these Sentinels call ``name``
============================================================  =======================================================

With ``rediss`` in the place of ``redis`` all connections use TLS. Options stand behind a ``?`` as for one server
(``ssl_ca_certs`` and others of redis-py); ``sentinel_username`` and ``sentinel_password`` are the Sentinels' own.
Nothing here ever shows a password.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

SENTINEL_S: Final = 2.5
"""How long one Sentinel may take before the next one is asked."""
CLUSTER: Final = ("redis+cluster", "rediss+cluster")
SENTINEL: Final = ("redis+sentinel", "rediss+sentinel")
SINGLE: Final = ("redis", "rediss", "unix")

NO_CLUSTER: Final = (
    "Celery cannot use a Redis Cluster as its broker: with redis_url a cluster, set broker_url to a Redis of its own "
    "(redis://…, redis+sentinel://…) or to RabbitMQ (amqp://…)"
)

_HOSTS: Final = "the hosts must read host:port,host:port … behind the one @ of user and password (a comma there is %2C)"
_PORTS: Final = {"redis+cluster": 6379, "rediss+cluster": 6379, "redis+sentinel": 26379, "rediss+sentinel": 26379}
_SENTINELS_OWN: Final = ("sentinel_username", "sentinel_password")

Kind = Literal["single", "cluster", "sentinel"]


@dataclass(frozen=True, slots=True)
class Address:
    """What an address says. ``nodes`` are those that it names; empty for one server."""

    kind: Kind
    nodes: tuple[tuple[str, int], ...] = ()
    tls: bool = False
    userinfo: str = ""
    """``user:password@``, quoted as it stood there, or nothing."""
    query: str = ""
    service: str = ""
    database: int = 0
    sentinel_username: str | None = None
    sentinel_password: str | None = None

    def url_of(self, host: str, port: int) -> str:
        """The address of one server with the same credentials and options, as redis-py reads it."""
        name = f"[{host}]" if ":" in host else host
        query = f"?{self.query}" if self.query else ""
        return f"{'rediss' if self.tls else 'redis'}://{self.userinfo}{name}:{port}/{self.database}{query}"


def kind_of(url: str) -> Kind:
    """What stands behind an address, by its scheme."""
    scheme = urlsplit(url).scheme
    return "cluster" if scheme in CLUSTER else "sentinel" if scheme in SENTINEL else "single"


def read_address(url: str) -> Address:
    """An address of several servers, taken apart.

    Raises ValueError, with what is wrong and what to do, without any password.
    """
    parts = urlsplit(url)
    kind = kind_of(url)
    if kind == "single":
        return Address("single")
    userinfo, at, hosts = parts.netloc.rpartition("@")
    if "," in userinfo:
        raise ValueError(_HOSTS)
    nodes = tuple(_node(entry, _PORTS[parts.scheme]) for entry in hosts.split(","))
    options = parse_qsl(parts.query, keep_blank_values=True)
    own = {name: value for name, value in options if name in _SENTINELS_OWN}
    address = Address(
        kind,
        nodes,
        parts.scheme.startswith("rediss"),
        userinfo + at,
        urlencode([(name, value) for name, value in options if name not in _SENTINELS_OWN]),
    )
    path = [unquote(part) for part in parts.path.split("/")[1:]]
    if kind == "cluster":
        if path not in ([], [""], ["0"]):
            raise ValueError(f"a Redis Cluster has no database but 0: leave /{'/'.join(path)[:40]} out")
        return address
    if not path or not path[0] or len(path) > 2:
        raise ValueError(
            "a Sentinel's address ends with the name of what it watches: redis+sentinel://host:26379/mymaster/0"
        )
    database = path[1] if len(path) > 1 and path[1] else "0"
    if not (database.isascii() and database.isdecimal()):
        raise ValueError(f"the database is a number, not {database[:40]!r}")
    return Address(
        kind,
        nodes,
        address.tls,
        address.userinfo,
        address.query,
        path[0],
        int(database),
        own.get("sentinel_username"),
        own.get("sentinel_password"),
    )


def _node(entry: str, default_port: int) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{entry}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or "@" in entry:
        # Never the entry itself: where an @ is missing or doubled it may be a part of the password.
        raise ValueError(_HOSTS)
    return host, port or default_port


def where(url: str) -> str:
    """The address without its password, for messages."""
    try:
        parts = urlsplit(url)
        if parts.scheme == "unix":
            return parts.path
        if kind_of(url) == "single":
            return f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
        address = read_address(url)
    except ValueError:
        # Any part of it may be one of the password.
        return "an address that cannot be read"
    nodes = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in address.nodes)
    return f"{nodes} (cluster)" if address.kind == "cluster" else f"{address.service} of Sentinel {nodes}"


def kombu_address(url: str) -> tuple[str, dict[str, Any]]:
    """An address as kombu reads it, and the transport options that it needs beside; see
    :func:`promptmill.enqueue.broker_address`."""
    if kind_of(url) != "sentinel":
        return url, {}
    address = read_address(url)
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in address.nodes]
    # Credentials and database are read from the first one; they are the primary's.
    urls = [f"sentinel://{address.userinfo}{hosts[0]}/{address.database}", *(f"sentinel://{h}" for h in hosts[1:])]
    own = {"username": address.sentinel_username, "password": address.sentinel_password}
    sentinel: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
    # One that is down must not be asked for seconds before the next one is.
    sentinel |= {"socket_connect_timeout": SENTINEL_S, "socket_timeout": SENTINEL_S}
    if address.tls:
        sentinel |= {
            "ssl": True,
            **{name: value for name, value in parse_qsl(address.query) if name.startswith("ssl_")},
        }
    return ";".join(urls), {"master_name": address.service, "sentinel_kwargs": sentinel}


def kombu_tls(url: str) -> dict[str, str] | None:
    """The TLS options of a broker behind Sentinel, as Celery's ``broker_use_ssl`` has them; else None."""
    if kind_of(url) != "sentinel":
        return None
    address = read_address(url)
    given = {name: value for name, value in parse_qsl(address.query) if name.startswith("ssl_")}
    return {"ssl_cert_reqs": "required", **given} if address.tls else None
