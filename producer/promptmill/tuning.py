"""What every long-running process of ours asks of the interpreter, so that tokens do not wait for it."""

from __future__ import annotations

import gc
import resource
import sys
from typing import Final

_SWITCH_S: Final = 0.0005
_YOUNG_OBJECTS: Final = 20_000


def tune_interpreter() -> None:
    """Call once, when everything is imported and made, and before the first job.

    Threads (Celery's, the one that sends messages) give the interpreter back after 0.5 ms; the default of 5 ms is what
    every token would wait for them. What was imported is never looked at by the garbage collector again: a full
    collection over it takes a tenth of a second and more.
    """
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 50)


def raise_file_limit() -> None:
    """As many descriptors as the hard limit allows: the usual soft one of 1024 is fewer than one busy process needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard not in {soft, resource.RLIM_INFINITY}:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
