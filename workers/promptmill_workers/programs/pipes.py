"""The worker's ends of a program's pipes. None of them ever makes the event loop wait."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import termios
from typing import Final

CHUNK_BYTES: Final = 65536


class Pipe:
    """A pipe whose one end is ours. ``theirs`` is closed once it was passed on."""

    def __init__(self, *, ours_reads: bool) -> None:
        read, write = os.pipe()
        self.ours, self.theirs = (read, write) if ours_reads else (write, read)
        os.set_blocking(self.ours, False)

    def passed_on(self) -> None:
        """Close the program's end here."""
        if self.theirs >= 0:
            os.close(self.theirs)
            self.theirs = -1

    def close(self) -> None:
        """Close both ends."""
        self.passed_on()
        if self.ours >= 0:
            os.close(self.ours)
            self.ours = -1


def waiting_bytes(fd: int) -> int:
    """How much lies in a pipe."""
    size = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, size)
    return size[0]


class Feeder:
    """Writes ``data`` into a pipe as it is taken, and closes it. A reader that goes away is no error.

    With ``hold`` the pipe stays open until ``close``: its reader sees no end.
    """

    def __init__(self, data: bytes, *, hold: bool = False) -> None:
        self.pipe = Pipe(ours_reads=False)
        self._hold = hold
        self._left = memoryview(data)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to write."""
        self._loop = loop
        loop.add_writer(self.pipe.ours, self._write)

    def _write(self) -> None:
        try:
            written = os.write(self.pipe.ours, self._left[: 16 * CHUNK_BYTES]) if self._left else 0
        except BlockingIOError:
            return
        except OSError:
            self.close()  # the program does not want to read it: how it ends tells the rest
            return
        self._left = self._left[written:]
        if self._left:
            return
        if not self._hold:
            self.close()
        elif self._loop is not None:
            self._loop.remove_writer(self.pipe.ours)

    def close(self) -> None:
        """Write no more."""
        if self._loop is not None and self.pipe.ours >= 0:
            self._loop.remove_writer(self.pipe.ours)
        self.pipe.close()
        self._left = memoryview(b"")


class Tail:
    """Drains a pipe and keeps its last ``bound`` bytes."""

    def __init__(self, bound: int) -> None:
        self.pipe = Pipe(ours_reads=True)
        self._bound = bound
        self._kept = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to drain."""
        self._loop = loop
        loop.add_reader(self.pipe.ours, self._read, CHUNK_BYTES)

    def _read(self, size: int) -> int:
        try:
            piece = os.read(self.pipe.ours, size)
        except BlockingIOError:
            return 0
        if piece:
            self._kept += piece
            del self._kept[: -self._bound]
        else:
            self.close()
        return len(piece)

    def finish(self) -> None:
        """Take what lies in the pipe now."""
        if self.pipe.ours < 0:
            return
        left = waiting_bytes(self.pipe.ours)
        while left > 0 and (read := self._read(min(left, CHUNK_BYTES))):
            left -= read

    @property
    def kept(self) -> bytes:
        """The tail."""
        return bytes(self._kept)

    def close(self) -> None:
        """Drain no more."""
        if self._loop is not None and self.pipe.ours >= 0:
            self._loop.remove_reader(self.pipe.ours)
        self.pipe.close()


class Output:
    """A pipe that is read as far as somebody asks for more, and to the program's end, not to the pipe's."""

    def __init__(self) -> None:
        self.pipe = Pipe(ours_reads=True)
        self._ended = False
        self._left = 0
        self._waiter: asyncio.Future[None] | None = None

    def end(self) -> None:
        """The program ended: what lies in the pipe is all that it said, whoever else still holds it."""
        if self._ended or self.pipe.ours < 0:
            return
        self._ended = True
        self._left = waiting_bytes(self.pipe.ours)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> bytes:
        """The next bytes, ``b""`` at the end of the program or of the pipe, whichever comes first."""
        while self.pipe.ours >= 0:
            if self._ended and self._left <= 0:
                return b""
            # One that writes faster than we read would else keep the loop from all others.
            await asyncio.sleep(0)
            try:
                chunk = self._take()
            except BlockingIOError:
                if self._ended:
                    return b""
                await self._news()
                continue
            self._left -= len(chunk)
            return chunk
        return b""

    def _take(self) -> bytes:
        if self.pipe.ours < 0:
            return b""
        return os.read(self.pipe.ours, min(CHUNK_BYTES, self._left) if self._ended else CHUNK_BYTES)

    async def _news(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        loop.add_reader(self.pipe.ours, self._wake)
        try:
            await self._waiter
        finally:
            if self.pipe.ours >= 0:
                loop.remove_reader(self.pipe.ours)
            self._waiter = None

    def close(self) -> None:
        """Read no more; whoever waits in ``read`` gets the end."""
        self._ended, self._left = True, 0
        if self._waiter is not None:
            asyncio.get_running_loop().remove_reader(self.pipe.ours)
            self._wake()
        self.pipe.close()
