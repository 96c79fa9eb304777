"""The lifeline: how a process of ``promptmill up`` learns that ``up`` is dead.

``up`` holds the only write end of a pipe; every process that it starts inherits the read end. Nothing is ever written.
However ``up`` ends, kill -9 included, the kernel closes the write end and every reader sees the end of the file.
"""

from __future__ import annotations

import os
import signal
import threading

from promptmill.settings import lifeline_fd


def watch_lifeline() -> threading.Thread | None:
    """Kill this process at once when ``promptmill up``, which started it, is dead.

    Call it first in an entry point, once. Returns the watching daemon thread, or None in a process that ``up`` did
    not start. The kill is a SIGKILL to this process alone: the store died together with ``up``, so there is nothing to
    drain to, and any gentler end would wait for locks, loops or threads that may hang on that very store. Programs
    started by this process have guards of their own, which see this process's end in the same way.
    """
    fd = lifeline_fd()
    if fd is None:
        return None
    # Not for our own children: one that outlived us would hold nothing open, but it would also watch the wrong parent.
    os.set_inheritable(fd, False)
    thread = threading.Thread(target=_wait, args=(fd,), name="lifeline", daemon=True)
    thread.start()
    return thread


def _wait(fd: int) -> None:
    while os.read(fd, 64):
        continue
    os.kill(os.getpid(), signal.SIGKILL)
