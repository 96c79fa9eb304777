"""`python -m tests.support.simulator`: one simulator in a process of its own.

Prints one line `{"url": "http://127.0.0.1:PORT"}` when it listens. Ends with code 0 on SIGTERM, SIGINT and, with
`--die-with-stdin`, when standard input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import threading

from tests.support.simulator.server import Simulator

try:
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop


async def _serve(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with Simulator(host=options.host, port=options.port, key=options.key) as simulator:
        if options.die_with_stdin:
            threading.Thread(target=_watch_stdin, args=(loop, stopped), daemon=True).start()
        print(json.dumps({"url": simulator.url}), flush=True)
        await stopped.wait()


def _watch_stdin(loop: asyncio.AbstractEventLoop, stopped: asyncio.Event) -> None:
    # os.read, not sys.stdin: a thread that holds its lock aborts the interpreter's exit.
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(stopped.set)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.simulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free port")
    parser.add_argument("--key", help="requests without this key are refused")
    parser.add_argument("--die-with-stdin", action="store_true", help="end when standard input ends")
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(options))


if __name__ == "__main__":
    main()
