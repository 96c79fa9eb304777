"""The address of a broker behind Sentinel, as kombu and Celery read it."""

from __future__ import annotations

from urllib.parse import parse_qsl

from redis.backoff import NoBackoff
from redis.retry import Retry

from promptmill.addresses import SENTINEL_S, kind_of, read_address


def kombu_address(url: str) -> tuple[str, dict[str, object]]:
    """An address as kombu reads it, and the transport options that it needs beside."""
    if kind_of(url) != "sentinel":
        return url, {}
    address = read_address(url)
    hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in address.nodes]
    # Credentials and database are read from the first one; they are the primary's.
    urls = [f"sentinel://{address.userinfo}{hosts[0]}/{address.database}", *(f"sentinel://{h}" for h in hosts[1:])]
    own = {"username": address.sentinel_username, "password": address.sentinel_password}
    sentinel: dict[str, object] = {name: value for name, value in own.items() if value is not None}
    # One that is down must not be asked for seconds before the next one is.
    sentinel |= {"socket_connect_timeout": SENTINEL_S, "socket_timeout": SENTINEL_S, "retry": Retry(NoBackoff(), 0)}
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
