"""The worker's end of its warden: one a process, for all of its event loops, started at the first use.

A thread starts the warden and hears its answers: starting a process can take long where a thousand threads run, and
an event loop that ends must not take the warden with it.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from promptmill.settings.process import inherited
from promptmill.up.part import guard_interpreter
from promptmill_workers.programs.guarding.warden import RECORD_BYTES, parse, record

logger = logging.getLogger(__name__)

_MAIN: Final = Path(__file__).with_name("guarding") / "__main__.py"
_NEEDED: Final = frozenset({"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT"})
"""What an interpreter may need to start. Nothing else of the environment: programs can read a guard's in /proc."""


class WardenDied(Exception):
    """The warden ended before it answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a run: ``G`` nothing is left, ``L`` something is, ``F`` no guard (``number``: errno)."""

    letter: str
    number: int = 0


class Link:
    """One warden. ``dead`` once it ended."""

    def __init__(self, root: str) -> None:
        self.pid = 0
        """0 until it was started."""
        self.dead = False
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Future[Answer]]] = {}
        self._socket, theirs = socket.socketpair()
        threading.Thread(target=self._serve, args=(theirs, root), name="warden", daemon=True).start()

    def start(self, token: str, end_ms: int, fds: Sequence[int]) -> asyncio.Future[Answer]:
        """Start a guard with ``fds``, which stay the caller's too; it may take ``end_ms`` to end when told.

        The future is done when the guard ended: cancelling it changes nothing but that. It raises WardenDied.

        Raises
        ------
        OSError
            The warden cannot be asked.
        """
        return self._ask(record("S", token, end_ms), token, fds)

    def clear(self, token: str) -> asyncio.Future[Answer]:
        """End what the guard of ``token`` left, which died under an earlier warden. As :meth:`start`."""
        return self._ask(record("W", token), token, ())

    def kill(self, token: str) -> None:
        """Kill the guard of ``token``. Raises OSError as :meth:`start`."""
        with self._lock:
            self._send(record("K", token), ())

    def _ask(self, message: bytes, token: str, fds: Sequence[int]) -> asyncio.Future[Answer]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        with self._lock:
            if self.dead:
                raise BrokenPipeError("the warden is dead")
            self._send(message, fds)
            self._waiting[token] = (loop, future)
        return future

    def _send(self, message: bytes, fds: Sequence[int]) -> None:
        # Not socket.send_fds, which drops the flags before Python 3.12.
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self._socket.sendmsg([message], passed, socket.MSG_DONTWAIT)

    def forget_in_child(self) -> None:
        """In a fork of the worker: the warden is the parent's, and must see the parent's end."""
        self._socket.close()

    def _serve(self, theirs: socket.socket, root: str) -> None:
        process: subprocess.Popen[bytes] | None = None
        try:
            with theirs:
                process = subprocess.Popen(  # noqa: S603
                    [guard_interpreter(), "-I", "-S", str(_MAIN), str(theirs.fileno()), root],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=inherited(_NEEDED.__contains__),
                    # A Ctrl-C at the terminal is the worker's to act on.
                    start_new_session=True,
                )
            self.pid = process.pid
            while message := self._socket.recv(RECORD_BYTES, socket.MSG_WAITALL):
                letter, token, number = parse(message)
                self._resolve(token, Answer(letter, number))
        except OSError:
            logger.exception("the warden of the programs cannot be started, or not be heard")
        finally:
            self._end(process)

    def _end(self, process: subprocess.Popen[bytes] | None) -> None:
        with self._lock:
            self.dead = True
            self._socket.close()
            left = list(self._waiting)
        for token in left:
            self._resolve(token, None)
        if process is not None:
            logger.error("the warden of the programs ended (%d); the next program starts another", process.wait())

    def _resolve(self, token: str, answer: Answer | None) -> None:
        with self._lock:
            found = self._waiting.pop(token, None)
        if found is None:
            return
        loop, future = found

        def settle() -> None:
            if future.done():
                return
            if answer is None:
                future.set_exception(WardenDied())
                future.exception()  # whoever no longer waits need not be told
            else:
                future.set_result(answer)

        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            loop.call_soon_threadsafe(settle)


_link: Link | None = None
_link_lock = threading.Lock()


def warden(root: str) -> Link:
    """The process's warden for the jobs below ``root``, a new one where the last one died. Does not block."""
    global _link  # noqa: PLW0603 - one a process is the point
    with _link_lock:
        if _link is None or _link.dead:
            _link = Link(root)
        return _link


def _forget() -> None:
    global _link, _link_lock
    if _link is not None:
        _link.forget_in_child()
    _link, _link_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
