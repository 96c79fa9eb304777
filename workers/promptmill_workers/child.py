"""``python -m promptmill_workers.child``: one call of one backend, in a process of its own.

Started by :mod:`promptmill_workers.isolated`, which describes the lines in :mod:`promptmill_workers.items`: the order
comes on standard input, the items go to standard output. Nothing of the order is in the arguments or in the environment
that the process was started with.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import IO, Final

from promptmill.errors import BackendError, ConfigError, MissingExtra
from promptmill.settings.process import take_variables
from promptmill_workers.backends import load_backend
from promptmill_workers.backends.base import Backend, Finished, Item
from promptmill_workers.items import Order, encode_error, encode_item

logger = logging.getLogger(__name__)


_EXIT_OK: Final = 0
_EXIT_TERMINATED: Final = 128 + signal.SIGTERM


def main() -> None:
    """Serve the one order. Never returns."""
    output = take_output()
    order = Order.model_validate_json(_take_input())
    take_variables(order.variables)
    asyncio.run(_to_the_end(order, output))


async def _to_the_end(order: Order, output: IO[bytes]) -> None:
    code = await _serve(order, output)
    sys.stdout.flush()
    sys.stderr.flush()
    # From here, before anything joins threads: one that a library left behind must not keep the process.
    os._exit(code)


def take_output() -> IO[bytes]:
    """Standard output for us alone: what a library prints goes to standard error, or it would garble the protocol.

    The copy is not inherited by programs that the backend starts.
    """
    output = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return output


def _take_input() -> bytes:
    """All of standard input, which is empty from then on."""
    with os.fdopen(os.dup(0), "rb") as given:
        order = given.read()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return order


async def _serve(order: Order, output: IO[bytes]) -> int:
    """The order's items and its last line; answers the exit status."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - for the type checker
    # The guard's TERM: the backend closes what it opened, as it would when its generator is closed in the worker.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        async with _Made(order) as backend, aclosing(_items(backend, order)) as items:
            async for item in items:
                _write(output, encode_item(item))
    except BackendError as err:
        _write(output, encode_error(err))
    except asyncio.CancelledError:
        return _EXIT_TERMINATED
    except Exception as err:
        # As in a worker without isolation: a bug of a backend's is `crashed`, and its trace is for the log.
        logger.exception("the backend of model %r crashed", order.name)
        _write(output, encode_error(BackendError(f"the backend crashed: {type(err).__name__}", code="crashed")))
    return _EXIT_OK


class _Made:
    """The order's backend, closed on the way out."""

    def __init__(self, order: Order) -> None:
        try:
            self._backend = load_backend(order.name, order.config)
        except (ConfigError, MissingExtra) as err:
            raise BackendError(f"model {order.name!r}: {err}", code="bad_request") from err

    async def __aenter__(self) -> Backend:
        return self._backend

    async def __aexit__(self, *_: object) -> None:
        await self._backend.aclose()


async def _items(backend: Backend, order: Order) -> AsyncGenerator[Item, None]:
    """The backend's items up to its end, and an error where there was none."""
    async with aclosing(backend.complete(order.call)) as items:
        async for item in items:
            yield item
            if isinstance(item, Finished):
                return
    raise BackendError("the answer ended without its end", code="cut")


def _write(output: IO[bytes], line: bytes) -> None:
    # Blocks while the worker does not read, which is the back-pressure: this process has nothing else to do.
    rest = memoryview(line)
    while rest:
        rest = rest[output.write(rest) :]


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    main()
