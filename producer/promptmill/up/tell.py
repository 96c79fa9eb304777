"""What ``up`` says on standard error, without ever waiting for who reads it."""

from __future__ import annotations

import os
import queue
import sys
import threading
from typing import Final

_WAITING_LINES: Final = 2_000
_CLOSE_S: Final = 1.0


class Teller:
    """Lines to standard error from a thread of its own.

    A terminal that was stopped, or a pipe that nobody reads, would otherwise stop the loop that must see signals and
    deaths. Past 2,000 waiting lines new ones are dropped, and their number is told.
    """

    def __init__(self) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
        self._dropped = 0
        try:
            self._fd: int | None = sys.stderr.fileno()
        except (OSError, ValueError):
            self._fd = None  # replaced by something that is no file
        self._thread = threading.Thread(target=self._write, name="teller", daemon=True)
        self._thread.start()

    def __call__(self, line: str) -> None:
        """Say one line; never blocks and never raises."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write what waits, for at most a second."""
        try:
            self._lines.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _put(self, text: str) -> None:
        if self._fd is None:
            sys.stderr.write(text)
            sys.stderr.flush()
            return
        # Past sys.stderr: whoever flushes it at the process's end would wait for the lock that a blocked write holds.
        data = text.encode(errors="replace")
        while data:
            data = data[os.write(self._fd, data) :]

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            try:
                if dropped:
                    self._put(f"({dropped} lines dropped: standard error was not read)\n")
                self._put(line + "\n")
            except (OSError, ValueError):
                # The terminal is gone. What runs must go on all the same, or end in order.
                continue
