"""The data directory of ``promptmill up``: one ``up`` at a time, its secrets readable by its owner only.

=============  ================================================================================================
``lock``       held (flock) as long as an ``up`` or its store runs; names its pid. Never deleted: two could hold it
``up.json``    written when ready, removed at the end: how clients on this machine find the running ``up``
``store.json`` the embedded store's port and password, kept, so that its address survives a restart
``store/``     the embedded store's data and its log
=============  ================================================================================================
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from promptmill.errors import ConfigError, PromptmillError, StoreUnavailable
from promptmill.settings import Settings

_LOCK_WAIT_S: Final = 0.5
_STORE_END_S: Final = 15.0
_LOCK_PAUSE_S: Final = 0.02

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RunningUp:
    """What a ready ``promptmill up`` says of itself in ``up.json``."""

    pid: int
    url: str
    redis_url: str
    broker_url: str
    pids: dict[str, int]

    def put_in(self, settings: Settings) -> Settings:
        """The settings of a client that uses this ``up``: its store, and its broker where that is another server."""
        addresses = {"redis_url": self.redis_url}
        if self.broker_url != self.redis_url and settings.broker_url is None:
            addresses["broker_url"] = self.broker_url
        return settings.model_copy(update=addresses)


class DataDir:
    """A data directory whose lock this process holds. Use it as a context manager, or call ``close``."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def take(cls, path: Path) -> Self:
        """Make ``path`` where it is missing (mode 0700) and lock it.

        Raises
        ------
        ConfigError
            The directory cannot be made or used.
        PromptmillError
            ``data_dir_in_use``: another ``up`` runs on it; the message names its pid and address.
        StoreUnavailable
            The disk is full.
        """
        path = path.expanduser().absolute()
        fd = _on_disk(path, lambda: _open_lock(path))
        try:
            _lock(fd, path)
            os.ftruncate(fd, 0)
            _on_disk(path, lambda: os.pwrite(fd, f"{os.getpid()}\n".encode(), 0))
        except BaseException:
            os.close(fd)
            raise
        (path / "up.json").unlink(missing_ok=True)  # left by an `up` that was killed
        return cls(path, fd)

    @property
    def lock_fd(self) -> int:
        """For the store's guard to hold as well: the lock then lasts until both are gone."""
        return self._lock_fd

    def close(self) -> None:
        """Give the directory free. Safe to call twice."""
        if self._lock_fd < 0:
            return
        (self.path / "up.json").unlink(missing_ok=True)
        os.close(self._lock_fd)
        self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str) -> dict[str, Any]:
        """A file's JSON object; empty where there is none or it is damaged: all of it can be made anew."""
        return _read_json(self.path / name)

    def write(self, name: str, data: dict[str, Any]) -> None:
        """Replace a file whole (mode 0600), or raise StoreUnavailable and leave the old one."""
        _on_disk(self.path, lambda: _replace(self.path / name, json.dumps(data).encode()))

    def subdirectory(self, name: str) -> Path:
        """A directory (mode 0700) in this one, made where it is missing. Raises StoreUnavailable, ConfigError."""
        path = self.path / name
        _on_disk(self.path, lambda: path.mkdir(mode=0o700, exist_ok=True))
        return path


def find_running_up(path: Path) -> RunningUp | None:
    """The ``up`` that is ready on this data directory, or None.

    The file alone proves nothing, a killed ``up`` leaves it behind: it counts only while the lock is held.
    """
    data = _read_json(path.expanduser() / "up.json")
    if not data or not _is_locked(path.expanduser() / "lock"):
        return None
    try:
        found = RunningUp(
            pid=int(data["pid"]),
            url=str(data["url"]),
            redis_url=str(data["redis_url"]),
            broker_url=str(data.get("broker_url") or data["redis_url"]),
            pids=dict(data["pids"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
    # For a moment after a kill -9 the dying store still holds the lock.
    return found if _is_alive(found.pid) else None


def _open_lock(path: Path) -> int:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077:
        path.chmod(0o700)  # it will hold passwords and prompts
    return os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _lock(fd: int, path: Path) -> None:
    started = time.monotonic()
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # A client that asks whether an `up` runs holds the lock for microseconds: that is no second `up`. And the
            # store of an `up` that was killed is about to end: two stores on the same data would ruin it.
            limit_s = _LOCK_WAIT_S if _is_alive(_holder(fd)) else _STORE_END_S
            if time.monotonic() - started < limit_s:
                time.sleep(_LOCK_PAUSE_S)
                continue
            raise _in_use(fd, path) from None
        return


def _holder(fd: int) -> int:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else 0


def _is_alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether it has ended, and whoever started it has not asked about that yet. False where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[:1] == [b"Z"]


def _in_use(fd: int, path: Path) -> PromptmillError:
    pid = _holder(fd) or "unknown"
    url = _read_json(path / "up.json").get("url")
    ready = f", ready at {url}" if url else ", still starting"
    return PromptmillError(
        f"the data directory {path} is used by another `promptmill up` (pid {pid}{ready}): "
        "stop that one, or give this one another --data-dir",
        code="data_dir_in_use",
        field="data_dir",
    )


def _is_locked(lock: Path) -> bool:
    try:
        fd = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _replace(path: Path, content: bytes) -> None:
    new = path.with_name(f"{path.name}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            # Written and synced before it takes the old one's place: a full disk shows here.
            file.write(content)
            file.flush()
            os.fsync(fd)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def _on_disk(path: Path, act: Callable[[], T]) -> T:
    try:
        return act()
    except OSError as err:
        if err.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StoreUnavailable(f"the disk under {path} is full: make room, or use another --data-dir") from err
        raise ConfigError(
            f"data_dir: {path} cannot be used: {err.strerror}. Give another one with --data-dir", field="data_dir"
        ) from err
