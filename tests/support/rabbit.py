"""A real RabbitMQ for tests: it runs as whoever starts it, in a directory of its own, and ends with all its helpers."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from tests.support.processes import tree, wait_gone

START_S: Final = 90.0
"""It takes 5 s of processor time."""
STOP_S: Final = 60.0

_PROGRAMS: Final = ("/usr/lib/rabbitmq/bin/rabbitmq-server", "/opt/rabbitmq/sbin/rabbitmq-server")
"""Looked at first: what Debian puts on PATH is a wrapper that becomes the user `rabbitmq`."""

# Who holds a message for so many milliseconds without acknowledging it loses its channel; by default after 30 minutes.
_CONFIG: Final = """
log.console = false
consumer_timeout = 5000
"""


def rabbit_program() -> str | None:
    """The server's start script; None where RabbitMQ is not installed."""
    found = next((path for path in _PROGRAMS if Path(path).exists()), None) or shutil.which("rabbitmq-server")
    return found if found and shutil.which("epmd") else None


def rabbit_missing() -> str | None:
    """Why tests with RabbitMQ cannot run here; None where they can. In CI its absence is a failure, not a reason."""
    if rabbit_program() is not None:
        return None
    reason = "rabbitmq-server is not installed: apt-get install rabbitmq-server"
    if os.environ.get("CI"):
        pytest.fail(reason)
    return reason


def steady_port() -> int:
    """A free port that the kernel gives to no outgoing connection, so that it stays free while a server is down.

    Who connects to a closed port of the other kind again and again may end up connected to itself.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(min(20_000, first - 2_000), first)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class RabbitServer:
    """A RabbitMQ node that a test may kill and start again on the same port and data."""

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        command: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """``command`` and ``variables`` are for a server that is started in another way than the tests' own."""
        self._directory = directory
        self._command = command
        self._variables = variables or {}
        self._node = f"rabbit-{secrets.token_hex(4)}@localhost"
        self._log = directory / "out.log"
        self._epmd: subprocess.Popen[bytes] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.port = port or steady_port()
        self.environment: dict[str, str] = {}
        """What the server was started with; its tools need the same."""

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def start(self) -> None:
        """Start it and wait until it accepts clients."""
        assert self.process is None, "it runs already"
        program = rabbit_program()
        assert program is not None, rabbit_missing()
        # Erlang's register of nodes would stay behind as a daemon if the node started it.
        names, distribution = steady_port(), steady_port()
        (self._directory / "rabbit.conf").write_text(_CONFIG)
        (self._directory / "plugins").write_text("[].\n")
        with self._log.open("ab") as out:
            epmd = ["epmd", "-port", str(names), "-address", "127.0.0.1"]
            self._epmd = subprocess.Popen(epmd, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            self.environment = {**self._environment(names, distribution), **self._variables}
            self.process = subprocess.Popen(
                self._command or [program],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment,
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self._log.read_text(errors="replace")[-4000:]
                self.kill()
                raise AssertionError(f"RabbitMQ did not start:\n{said}")
            time.sleep(0.1)

    def _environment(self, names: int, distribution: int) -> dict[str, str]:
        at = self._directory
        erlang = f"-noinput -sname {self._node} -start_epmd false +S 2:2 +SDcpu 1:1 +SDio 4 "
        erlang += "-kernel inet_dist_use_interface {127,0,0,1} "
        erlang += f"inet_dist_listen_min {distribution} inet_dist_listen_max {distribution} "
        erlang += "-rabbit channel_tick_interval 1000"  # how often it looks for such messages
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(at),  # where Erlang keeps its cookie
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(names),
            "ERL_CRASH_DUMP_SECONDS": "0",
            "RABBITMQ_ALLOW_INPUT": "1",  # the server in the place of the script, not below it
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": erlang,
            "RABBITMQ_NODENAME": self._node,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_MNESIA_BASE": str(at / "data"),
            "RABBITMQ_LOG_BASE": str(at / "log"),
            "RABBITMQ_CONFIG_FILE": str(at / "rabbit"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(at / "plugins"),
        }

    def _answers(self) -> bool:
        """True once it speaks AMQP; its port is open a little earlier."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
                client.sendall(b"AMQP\x00\x00\x09\x01")
                return client.recv(1) == b"\x01"
        except OSError:
            return False

    def kill(self) -> None:
        """As with kill -9, of the server and all that it started."""
        if self.process is not None:
            pids = tree(self.process.pid) if self.process.poll() is None else set[int]()
            self.process.kill()
            for pid in pids - {self.process.pid}:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # it ended with the server
            self.process.wait()
            wait_gone(pids)
            self.process = None
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None

    def stop(self) -> None:
        """As with kill -TERM: it writes what it holds, then ends."""
        if self.process is not None:
            pids = tree(self.process.pid)
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
                wait_gone(pids)
            finally:
                self.kill()

    def restart(self) -> None:
        """Stop it and start it again with its data."""
        self.stop()
        self.start()


@contextmanager
def running_rabbit(directory: Path) -> Generator[RabbitServer]:
    """A RabbitMQ that ends with the block; skips the test where it is not installed."""
    if reason := rabbit_missing():
        pytest.skip(reason)
    server = RabbitServer(directory)
    server.start()
    try:
        yield server
    finally:
        server.kill()
