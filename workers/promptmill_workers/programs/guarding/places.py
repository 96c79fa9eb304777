"""Directories of jobs: how they are told from those of dead workers, and how they are removed.

One directory a user, one below it a job. A job's directory is locked (``flock``) by its worker and, through the same
open file, by its guard: one that nobody locks is left over. It is made under a name with a leading dot and locked
before it gets its own, so that none is taken for a leftover while it is being made.
"""

from __future__ import annotations

import fcntl
import os
import time

_MAKING_S = 60.0


def make(root: str, name: str) -> int:
    """Make and lock the directory ``root/name``; answers the descriptor that holds the lock. Raises OSError."""
    making = f"{root}/.{name}"
    os.mkdir(making, 0o700)  # noqa: PTH102
    fd = os.open(making, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(making, f"{root}/{name}")  # noqa: PTH104
    except OSError:
        os.close(fd)
        raise
    return fd


def stale(root: str) -> list[str]:
    """The names below ``root`` of what dead workers left."""
    found: list[str] = []
    try:
        names = os.listdir(root)  # noqa: PTH208
    except OSError:
        return found
    for name in names:
        try:
            if name.startswith(".") and time.time() - os.lstat(f"{root}/{name}").st_mtime < _MAKING_S:
                continue  # to lock it even for a moment would take it from whom it is being made by
            fd = _open_locked_out(f"{root}/{name}")
        except OSError:
            continue  # removed meanwhile, or no directory of ours
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(name)
        except BlockingIOError:
            continue
        finally:
            os.close(fd)
    return found


def _open_locked_out(path: str) -> int:
    """Open a directory of ours, also where a program took our own rights on it away. Raises OSError."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        return os.open(path, flags)
    except PermissionError:
        os.chmod(path, 0o700)  # noqa: PTH101
        return os.open(path, flags)


def remove(path: str) -> str:
    """Remove the directory ``path`` with whatever a program left in it; answers what could not be removed, or "".

    No link is followed, rights that were taken away are restored, and depth costs neither stack nor descriptors nor
    long paths: each directory that is found moves up to the top first.
    """
    try:
        top = _open_locked_out(path)
    except FileNotFoundError:
        return ""
    except OSError as err:
        return f"{path}: {err.strerror}"
    failed = ""
    try:
        os.fchmod(top, 0o700)
        waiting, moved, prefix = [""], 0, f"..{os.urandom(8).hex()}-"
        while waiting:
            name = waiting.pop()
            try:
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top) if name else os.dup(top)
                try:
                    with os.scandir(fd) as entries:
                        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
                    for child, is_directory in found:
                        if not is_directory:
                            os.unlink(child, dir_fd=fd)
                            continue
                        # Its own rights count too: to move a directory is to write its "..".
                        os.chmod(child, 0o700, dir_fd=fd)
                        moved += 1
                        os.rename(child, f"{prefix}{moved}", src_dir_fd=fd, dst_dir_fd=top)
                        waiting.append(f"{prefix}{moved}")
                finally:
                    os.close(fd)
                if name:
                    os.rmdir(name, dir_fd=top)
            except OSError as err:
                failed = f"{path}: {err.strerror}"
        os.rmdir(path)  # noqa: PTH106
    except OSError as err:
        failed = failed or f"{path}: {err.strerror}"
    finally:
        os.close(top)
    return failed
