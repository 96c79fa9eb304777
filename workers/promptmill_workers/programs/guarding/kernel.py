"""System calls that Python 3.11 has no names for. On other systems than Linux they raise OSError (ENOSYS)."""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False  # importing typing would cost as much as all the rest
if TYPE_CHECKING:
    from collections.abc import Callable

LINUX = sys.platform.startswith("linux")

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000


def _functions() -> tuple[Callable[..., int], Callable[..., int], Callable[..., int]] | None:
    if not LINUX:
        return None
    import ctypes  # noqa: PLC0415 - 10 ms that other systems need not pay

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]

    def checked(function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            result = function(*arguments)
            if result == -1:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            return result

        return call

    libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
    # Looked up now: after a fork, a child should do as little as it can.
    name = ctypes.create_string_buffer(16)

    def prctl(option: int, value: int | bytes) -> int:
        if isinstance(value, bytes):
            name.value = value[:15]
            return libc.prctl(option, ctypes.addressof(name), 0, 0, 0)
        return libc.prctl(option, value, 0, 0, 0)

    return checked(prctl), checked(libc.unshare), checked(libc.mount)


_found = _functions()


def _call(index: int, *arguments: object) -> None:
    if _found is None:
        raise OSError(errno.ENOSYS, "not on this system")
    _found[index](*arguments)


def die_with_parent(number: int) -> None:
    """Get signal ``number`` when the thread that forked this process ends. Cleared by a fork."""
    _call(0, _PR_SET_PDEATHSIG, number)


def become_subreaper() -> None:
    """Orphans among the descendants of this process become its children."""
    _call(0, _PR_SET_CHILD_SUBREAPER, 1)


def set_name(name: str) -> None:
    """What ``ps -o comm`` shows."""
    if LINUX:
        _call(0, _PR_SET_NAME, name.encode())


def unshare(flags: int) -> None:
    """Leave the namespaces of ``flags`` (``CLONE_NEW…``) for new ones."""
    _call(1, flags)


def mount_private_proc() -> None:
    """In a mount namespace of its own: a ``/proc`` that shows the PID namespace of this process alone."""
    _call(2, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call(2, b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)
