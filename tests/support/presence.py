"""Programs that show from outside how long anything of them lives, and who looks.

Such a program connects to a :class:`Presence` and says whose job it serves. All that it forks inherits the connection,
so the kernel ends it with the last of them: no process list is read, and the moment is exact.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.support.programs import script

MARK = "job "
"""What stands before a job's name in its prompt; the name ends at the next white space."""

_BODY = """
import json, os, re, signal, socket, sys, time
name = re.search(MARK + r"([^\\s\\"\\\\]+)", sys.stdin.readline()).group(1)
line = socket.create_connection(("127.0.0.1", PORT))
line.sendall(name.encode() + b"\\n")
nth = int(line.makefile().readline())
if HOSTILE:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(300)
        os._exit(0)
    os.wait()
def say(**line):
    sys.stdout.write(json.dumps(line) + "\\n")
    sys.stdout.flush()
words = ["tok%d " % n for n in range(FIRST_TOKENS if nth == 1 else TOKENS)]
time.sleep(FIRST_S)
for word in words:
    if DIALECT == "claude":
        delta = {"type": "text_delta", "text": word}
        say(type="stream_event", event={"type": "content_block_delta", "index": 0, "delta": delta})
    else:
        say(type="message", role="assistant", content=word, delta=True)
    time.sleep(PAUSE_S)
if DIALECT == "claude":
    say(type="result", subtype="success", is_error=False, result="".join(words))
else:
    say(type="result", status="success")
"""


@dataclass(frozen=True, slots=True)
class Visit:
    """One program: whose job it served, and when the last of its processes ended (``time.monotonic()``)."""

    name: str
    left_s: float | None


class Presence:
    """Listens on a free port of 127.0.0.1, in threads: usable from any loop and from none."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._server.getsockname()[1]
        self._lock = threading.Lock()
        self._visits: list[Visit] = []
        threading.Thread(target=self._accept, name="presence", daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        self._server.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who accepts
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                line, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._follow, args=(line,), daemon=True).start()

    def _follow(self, line: socket.socket) -> None:
        with line, line.makefile("rb") as said:
            name = said.readline().decode().strip()
            with self._lock:
                place = len(self._visits)
                self._visits.append(Visit(name, None))
            with suppress(OSError):  # it was killed with bytes unread: gone all the same
                line.sendall(b"%d\n" % len(self.visits(name)))
                said.read()
            with self._lock:
                self._visits[place] = Visit(name, time.monotonic())

    def visits(self, name: str | None = None) -> list[Visit]:
        """All programs so far, in the order of their arrival, or those of one job."""
        with self._lock:
            return [visit for visit in self._visits if name in {None, visit.name}]

    def here(self, name: str | None = None) -> int:
        """How many programs have a process that runs."""
        return sum(visit.left_s is None for visit in self.visits(name))


@contextmanager
def presence() -> Generator[Presence]:
    """One that is closed with the block."""
    made = Presence()
    try:
        yield made
    finally:
        made.close()


def present_program(
    directory: Path,
    seen_by: Presence,
    dialect: Literal["claude", "gemini"],
    *,
    tokens: int = 1000,
    first_tokens: int | None = None,
    pause_s: float = 0.05,
    first_s: float = 0.0,
    hostile: bool = False,
    name: str = "program",
) -> str:
    """A script that stands for ``claude`` or ``gemini`` and answers ``tok0 tok1 …``; answers its path.

    Its prompt must hold ``MARK`` and a name. ``first_tokens``: so many where it is the first for its job, in the place
    of ``tokens``. ``hostile``: it and a daemon that it forks heed no signal but KILL.
    """
    facts = {
        "MARK": MARK,
        "PORT": seen_by.port,
        "DIALECT": dialect,
        "TOKENS": tokens,
        "FIRST_TOKENS": tokens if first_tokens is None else first_tokens,
        "PAUSE_S": pause_s,
        "FIRST_S": first_s,
        "HOSTILE": hostile,
    }
    return script(directory, "".join(f"{name} = {value!r}\n" for name, value in facts.items()) + _BODY, name)
