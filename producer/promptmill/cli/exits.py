"""Exit codes of every command, stable.

====  ==================  ======================================================================================
code  name                when
====  ==================  ======================================================================================
0     OK                  done; for ``run``, ``models test`` and ``job stream``: the job succeeded; for ``batch run``
                          and ``batch watch``: every line did
1     FAILED              the job, or a line of the batch, failed or expired; ``doctor``: something that is configured
                          does not work; ``usage verify``: a sum is not that of its entries
2     USAGE               the command line or the request is wrong, or refused
3     NOT_FOUND           there is no such job or batch
4     CANCELLED           the job or the batch was cancelled
5     STORE_UNAVAILABLE   Redis cannot be reached, refuses us, is too old, or has no room
6     CONFIGURATION       configuration, installation, port or data directory; a file that cannot be written
7     NOT_READY           ``up``: a part died before all were ready, or they were not ready in time
8     WAIT_TIMEOUT        ``--timeout`` ran out; the job goes on
9     INTERNAL            an error in promptmill itself
130   INTERRUPTED         Ctrl-C or TERM before the command was done
====  ==================  ======================================================================================
"""

from __future__ import annotations

from typing import Final

from promptmill.errors import JobCancelled, JobFailed, PromptmillError

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
CANCELLED: Final = 4
STORE_UNAVAILABLE: Final = 5
CONFIGURATION: Final = 6
NOT_READY: Final = 7
WAIT_TIMEOUT: Final = 8
INTERNAL: Final = 9
INTERRUPTED: Final = 130

_BY_CODE: Final = {
    "not_found": NOT_FOUND,
    "store_unavailable": STORE_UNAVAILABLE,
    "bad_config": CONFIGURATION,
    "missing_extra": CONFIGURATION,
    "cannot_write": CONFIGURATION,
    "port_in_use": CONFIGURATION,
    "data_dir_in_use": CONFIGURATION,
    "part_died": NOT_READY,
    "not_ready": NOT_READY,
    "wait_timeout": WAIT_TIMEOUT,
    "internal": INTERNAL,
}


def exit_code(error: PromptmillError) -> int:
    """The exit code for an error. A job's own error is FAILED, whatever its code."""
    if isinstance(error, JobFailed):
        return FAILED
    if isinstance(error, JobCancelled):
        return CANCELLED
    return _BY_CODE.get(error.code, USAGE)
