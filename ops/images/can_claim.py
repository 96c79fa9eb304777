"""The worker container's health check: exit code 0 where the worker of this container can claim a job.

    python can_claim.py [FAMILY]       FAMILY is api where none is given

A process that runs proves little: it may still be connecting, be draining, or have lost Redis. Its heartbeat says
``ready`` only while it consumes, and goes stale within three periods when it stops.
"""

from __future__ import annotations

import asyncio
import socket
import sys

from promptmill.errors import PromptmillError
from promptmill.heartbeat import read_beats
from promptmill.queues import API_FAMILY
from promptmill.settings import load_settings
from promptmill.store import Store


def host_of(worker_id: str) -> str:
    """The host in a worker's id, ``NAME@HOST-PID-RANDOM``; a host may hold hyphens itself."""
    return worker_id.rpartition("@")[2].rsplit("-", 2)[0]


async def check(family: str) -> str | None:
    """Why no worker of this host can claim jobs of the family, or None where one can."""
    store = await Store.connect(load_settings().store_url, max_connections=1)
    try:
        beats, now_ms = await read_beats(store)
    finally:
        await store.aclose()
    mine = [beat for beat in beats if host_of(beat.worker) == socket.gethostname() and beat.family == family]
    if any(beat.state == "ready" and beat.fresh(now_ms) for beat in mine):
        return None
    found = ", ".join(f"{b.worker} {b.state}, {(now_ms - b.at_ms) / 1000:.1f} s ago" for b in mine)
    return f"no worker of {socket.gethostname()} can claim {family} jobs: {found or 'no heartbeat'}"


def main() -> int:
    """Run the check; the reason goes to standard error."""
    try:
        reason = asyncio.run(check(*(sys.argv[1:] or [API_FAMILY])))
    except PromptmillError as err:
        reason = f"error [{err.code}]: {err.message}"
    if reason is not None:
        sys.stderr.write(reason + "\n")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())
