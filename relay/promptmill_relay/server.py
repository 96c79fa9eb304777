"""One HTTP server process: its socket, its signals, and its end. Shared by the relay and the gateway.

The first TERM or INT stops accepting, ends every stream between two events, lets other answers finish within
``GRACE_S``, then cuts what is left. The second one exits at once. Whatever hangs, the process is gone ``HARD_S`` after
the first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

import uvicorn
import uvloop

from promptmill.metrics import Rows, loop_lag, metrics_port, reading
from promptmill.settings import Settings, listen_fd
from promptmill.tracing import flush_tracing, start_tracing
from promptmill.tuning import raise_file_limit, tune_interpreter
from promptmill.up.listen import bind, check_exposure
from promptmill_relay.problem import ASGIApp
from promptmill_relay.protocol import BoundedConfig
from promptmill_relay.stream import StreamEndpoint

logger = logging.getLogger(__name__)

GRACE_S: Final = 5
HARD_S: Final = 12.0
_CUT_AFTER_S: Final = GRACE_S - 1.0
# For the store, the broker and the log: a process that can open no more files could not even reconnect.
_FILES_FOR_THE_REST: Final = 128
# A peer that vanished without a word, or that reads nothing at all, is dropped by the kernel after this time.
_PEER_TIMEOUT_MS: Final = 120_000


@dataclass(frozen=True, slots=True)
class Service:
    """What a server serves. When one of ``background`` ends, the server stops; its error becomes the server's."""

    app: ASGIApp
    streams: StreamEndpoint
    background: Sequence[asyncio.Task[Any]] = field(default_factory=tuple)
    max_connections: int = 25_000
    """Never more than the process may open files, less some for everything else."""
    rows: Callable[[], Rows] = tuple
    """Figures for operators; see :func:`promptmill.metrics.reading`."""


OpenService = Callable[[Settings], AbstractAsyncContextManager[Service]]


def run(name: str, settings: Settings, open_service: OpenService) -> None:
    """Serve until a signal says to stop.

    Raises
    ------
    ConfigError
        An address beyond loopback without an API key, or one that this machine does not have.
    PromptmillError
        ``port_in_use``, or what ``open_service`` raises.
    """
    raise_file_limit()
    start_tracing(settings, name)
    sock = listening_socket(settings)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(name, settings, sock, open_service))
        flush_tracing()
    finally:
        sock.close()


async def _serve(name: str, settings: Settings, sock: socket.socket, open_service: OpenService) -> None:
    async with open_service(settings) as service:
        with measured(service, settings):
            await _serve_it(name, service, sock)


@contextmanager
def measured(service: Service, settings: Settings) -> Generator[int | None]:
    """Serve the figures of a service at the port of the settings while the block runs; yields the port."""
    with metrics_port(settings) as port, reading(service.rows), loop_lag():
        yield port


async def _serve_it(name: str, service: Service, sock: socket.socket) -> None:
    tune_interpreter()
    server = StreamServer(service)
    for task in service.background:
        task.add_done_callback(lambda _: server.stop())
    logger.info("%s listens on %s", name, _url(sock))
    await server.serve(sockets=[sock])
    for task in service.background:
        if task.done():
            task.result()


class StreamServer(uvicorn.Server):
    """uvicorn's server, with its end as described above."""

    def __init__(self, service: Service) -> None:
        super().__init__(
            BoundedConfig(
                service.app,
                max_connections=min(service.max_connections, _files_at_once() - _FILES_FOR_THE_REST),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                workers=1,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._streams = service.streams

    def stop(self) -> None:
        """Begin the end, as the first signal does."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, end the streams, let the rest finish within the grace, then cut."""
        logger.info("stopping; %d streams end", self._streams.open_streams)
        self._streams.stop()
        cut = asyncio.get_running_loop().call_later(_CUT_AFTER_S, self._cut)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()

    def _cut(self) -> None:
        # Readers that read nothing: their last bytes can never be written.
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # pyright: ignore[reportOptionalMemberAccess, reportUnknownMemberType]

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Signals are ours while serving; unlike uvicorn we do not raise them again, so a clean end exits with 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.should_exit:
            os._exit(128 + number)
        self.should_exit = True
        # A thread, because what hangs may be the event loop.
        watchdog = threading.Timer(HARD_S, os._exit, (1,))
        watchdog.daemon = True
        watchdog.start()


def listening_socket(settings: Settings) -> socket.socket:
    """The socket that ``promptmill up`` handed on, or a new one on ``settings.host`` and ``port``.

    Raises :class:`~promptmill.errors.ConfigError`, and ``port_in_use``.
    """
    fd = listen_fd()
    if fd is None:
        check_exposure(settings)
        sock = bind(settings.host, settings.port)
    else:
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
    try:
        if sock.family != socket.AF_UNIX:
            # What was handed on, or a name that stands for another address, counts as what it is.
            check_exposure(settings.model_copy(update={"host": sock.getsockname()[0]}))
            # Inherited by every accepted connection.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if sys.platform == "linux":
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _PEER_TIMEOUT_MS)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _files_at_once() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _url(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"http://{host}:{name[1]}"
