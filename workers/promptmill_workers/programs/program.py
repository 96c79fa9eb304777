"""A program as a backend sees it: private directories, a prompt on standard input, lines on standard output.

Nothing that a program starts outlives its ``run``, whatever dies: how, and what each level of protection promises, is
told in :mod:`.levels`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from promptmill.errors import BackendError, ConfigError
from promptmill_workers.programs import environment as environments
from promptmill_workers.programs.guarding import places
from promptmill_workers.programs.guarding.warden import JOB_LETTERS
from promptmill_workers.programs.levels import current_level
from promptmill_workers.programs.lines import LineFramer, LineTooLong
from promptmill_workers.programs.running import Order, Running, to_the_end

logger = logging.getLogger(__name__)

MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """Bounds of one program and all that it starts.

    ``line_bytes`` and ``output_bytes`` bound standard output (one line, and all of it); ``memory_bytes`` (None: no
    bound) each process's data; ``run_s`` is the guard's own bound, for the case that the worker does not end it;
    ``grace_s`` lies between TERM and KILL.
    """

    output_bytes: int = 256 * MIB
    line_bytes: int = 64 * MIB
    memory_bytes: int | None = None
    open_files: int = 1024
    run_s: float = 24 * 3600.0
    grace_s: float = 0.5


def find_program(name: str, *, field: str, advice: str) -> str:
    """The absolute path of a program named by path or looked up on PATH.

    Raises
    ------
    ConfigError
        There is none; the message names ``field`` and gives ``advice``.
    """
    found = shutil.which(os.path.expanduser(name))  # noqa: PTH111
    if found is None:
        raise ConfigError(f"{field}: there is no program {name!r}: {advice}", field=field)
    return str(Path(found).absolute())


class Program:
    """A running program. ``status`` is its exit status (negative: the signal) once ``lines`` came to its end."""

    def __init__(self, running: Running, limits: ProgramLimits, name: str) -> None:
        self._running = running
        self._limits = limits
        self._name = name

    @property
    def status(self) -> int | None:
        """None as long as it runs. ``-9`` also where its guard was killed, and it with its guard."""
        return self._running.status

    @property
    def stderr_tail(self) -> bytes:
        """The last 64 KiB of its standard error so far; all of it that there is once ``lines`` came to its end."""
        return self._running.errors.kept

    @property
    def pid(self) -> int:
        """Of the program, or at the level ``pidns`` of the init of its namespace."""
        return self._running.pid

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """Standard output, line by line, without the line ends; split at ``\\n`` only. A last line without one counts.

        Ends when the program (the leader) ended, even where a child of its still holds standard output. What is not
        taken is not read: the program waits in its ``write``.

        Raises
        ------
        BackendError
            ``malformed``: a line or the whole is over its bound.
        """
        framer = LineFramer(self._limits.line_bytes)
        size = 0
        while chunk := await self._running.output.read():
            size += len(chunk)
            if size > self._limits.output_bytes:
                raise BackendError(f"{self._name} wrote more than {self._limits.output_bytes} bytes", code="malformed")
            try:
                lines = framer.push(chunk)
            except LineTooLong as err:
                raise BackendError(f"{self._name} wrote {err}", code="malformed") from err
            for line in lines:
                yield line
        if rest := framer.flush():
            yield rest
        await self._running.exited.wait()


class Sandbox:
    """Private directories of one job: ``home``, ``tmp``, and ``work``, the empty working directory."""

    def __init__(self, name: str, root: Path, lock_fd: int) -> None:
        self.name = name
        self.root = root
        self.home, self.tmp, self.work = root / "home", root / "tmp", root / "work"
        self._lock_fd = lock_fd

    def write(self, path: str, data: bytes | str) -> Path:
        """A file for the program under ``home``, readable for us alone. Answers its absolute path.

        Raises
        ------
        BackendError
            ``crashed``: there is no room for it.
        """
        file = self.home / path
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                out.write(data.encode() if isinstance(data, str) else data)
        except OSError as err:
            raise _no_room(self.name, err) from err
        return file

    @asynccontextmanager
    async def run(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        stdin: bytes = b"",
        limits: ProgramLimits | None = None,
        secrets: Mapping[int, bytes] | None = None,
        hold_stdin: bool = False,
        level: str | None = None,
    ) -> AsyncGenerator[Program]:
        """Start ``command`` (absolute path first) and end it, with everything it started, on the way out.

        ``environment`` comes on top of an allow-list (PATH, LANG, LC_*, TZ, proxies, certificates) and of HOME, TMPDIR
        and friends. ``stdin`` is written and closed, with ``hold_stdin`` only on the way out. ``secrets`` are
        descriptors (3 and up) from which the program can read those bytes once. Nothing secret and no prompt belongs
        into ``command``, which everybody can see. ``level`` overrides the configured one. The way out takes at most the
        grace and, where a guard itself was attacked, some 20 s more; it is not cut short by cancelling.

        Raises
        ------
        BackendError
            ``crashed``: it cannot be started.
        """
        bounds = limits or ProgramLimits()
        order = Order(
            name=self.name,
            command=command,
            environment=environments.allowed() | environments.private(self.home, self.tmp) | {**environment},
            level=level or await current_level(),
            root=str(self.root.parent),
            directory=str(self.root),
            work=str(self.work),
            lock_fd=self._lock_fd,
            grace_s=bounds.grace_s,
            run_s=bounds.run_s,
            memory_bytes=bounds.memory_bytes,
            open_files=bounds.open_files,
        )
        try:
            running = Running(order, stdin, secrets or {}, hold_stdin=hold_stdin)
        except OSError as err:
            raise BackendError(f"{self.name} cannot be started: {err.strerror}", code="crashed") from err
        try:
            await running.start()
            yield Program(running, bounds, self.name)
        finally:
            await running.close()


@asynccontextmanager
async def open_sandbox(name: str) -> AsyncGenerator[Sandbox]:
    """Fresh private directories, removed on the way out. ``name`` is the program's, for messages.

    Raises
    ------
    BackendError
        ``crashed``: there is no place for them.
    """
    job = secrets.token_hex(JOB_LETTERS // 2)
    try:
        root = environments.jobs_root()
        lock_fd = places.make(root, job)
    except ConfigError as err:
        raise BackendError(err.message, code="crashed") from err
    except OSError as err:
        raise _no_room(name, err) from err
    box = Sandbox(name, Path(root, job), lock_fd)
    try:
        try:
            for part in (box.home, box.tmp, box.work):
                part.mkdir(mode=0o700)
        except OSError as err:
            raise _no_room(name, err) from err
        yield box
    finally:
        try:
            await _remove(str(box.root))
        finally:
            os.close(lock_fd)


def _no_room(name: str, err: OSError) -> BackendError:
    return BackendError(f"{name}: no place for a job's directories in TMPDIR: {err.strerror}", code="crashed")


async def _remove(path: str) -> None:
    if failed := await to_the_end(_removed(path)):
        logger.warning("not all of a job's directories could be removed: %s", failed)


async def _removed(path: str) -> object:
    """Remove, again a little later where that failed: a secret may lie there, and descriptors may have run out."""
    for wait_s in (0.1, 0.5, 2.0):
        # In a thread: a program can leave a million files.
        if not await asyncio.to_thread(places.remove, path):
            return None
        await asyncio.sleep(wait_s)  # nobody tells when there are descriptors again
    return await asyncio.to_thread(places.remove, path)
