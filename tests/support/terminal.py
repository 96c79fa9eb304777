"""A command in a pseudo-terminal, as somebody who sits in front of it sees it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes import PATIENCE_S

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>]")
_HOME = b"\x1b[H"
ALTERNATE, NORMAL = b"\x1b[?1049h", b"\x1b[?1049l"
"""How a program asks for a screen of its own, and gives it back."""


class Terminal:
    """``process`` with a terminal of its own. ``said`` is every byte that it wrote."""

    def __init__(
        self, command: Sequence[str], cwd: Path, env: Mapping[str, str], *, columns: int = 100, rows: int = 40
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.before: list[Any] = termios.tcgetattr(slave)
        self._slave = slave
        self.said = b""
        self.process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**env, "TERM": "xterm-256color"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Its controlling terminal: Ctrl-C is then a signal to it, as at a real one.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - one call, which takes no lock
        )

    @property
    def settings(self) -> list[Any]:
        """The terminal's settings as they are now; see :func:`termios.tcgetattr`."""
        return termios.tcgetattr(self._slave)

    def read(self, timeout_s: float = 0.1) -> None:
        """Take what was written, waiting for it a moment."""
        while select.select([self._master], [], [], timeout_s)[0]:
            with contextlib.suppress(OSError):  # nobody holds the other side
                self.said += os.read(self._master, 65536)
            timeout_s = 0.0

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self._master, keys)

    @property
    def screen(self) -> str:
        """The last whole picture, without colours."""
        pictures = self.said.split(_HOME)
        whole = pictures[-2] if len(pictures) > 2 else pictures[-1]
        return _CONTROL.sub(b"", whole).decode(errors="replace").replace("\r", "")

    def until(self, condition: Callable[[str], bool], description: str) -> str:
        """The first picture for which ``condition`` holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(self.screen):
            assert self.process.poll() is None, f"it ended, {description}:\n{self.said[-3000:]!r}"
            assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {description}\n{self.screen}"
            self.read()
        return self.screen

    def ended(self) -> int:
        """Its exit code, once it ended."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end\n{self.screen}"
            self.read()
        self.read()
        return self.process.returncode

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._master)
        os.close(self._slave)


@contextmanager
def terminal(
    command: Sequence[str], cwd: Path, env: Mapping[str, str], *, columns: int = 100, rows: int = 40
) -> Generator[Terminal]:
    """A command that ends with the block."""
    opened = Terminal(command, cwd, env, columns=columns, rows=rows)
    try:
        yield opened
    finally:
        opened.close()
