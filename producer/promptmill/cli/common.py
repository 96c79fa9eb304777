"""What several commands share: options, settings of a client, and how a coroutine is run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from promptmill.client import AsyncProducer
from promptmill.errors import StoreUnavailable
from promptmill.settings import Settings, load_settings
from promptmill.up.datadir import find_running_up
from promptmill.up.signals import StopRequest
from promptmill.up.stack import data_dir_of

CANCEL_WAIT_S: Final = 5.0

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", help="The configuration file (default: promptmill.toml, where it exists)."
    ),
]
DataDirOption = Annotated[
    Path | None, typer.Option("--data-dir", metavar="DIR", help="The data directory of `promptmill up`.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, one value a line.")]

T = TypeVar("T")


def client_settings(config: Path | None, data_dir: Path | None) -> Settings:
    """Settings with a store in them: the configured one, else that of the ``promptmill up`` that runs here."""
    settings = load_settings(config, data_dir=data_dir)
    if settings.redis_url is None and (running := find_running_up(data_dir_of(settings))):
        return running.put_in(settings)
    return settings


@asynccontextmanager
async def open_producer(settings: Settings) -> AsyncGenerator[AsyncProducer]:
    """A producer; where nothing was configured and nothing runs, the error says what to do."""
    async with AsyncProducer(settings) as producer:
        try:
            yield producer
        except StoreUnavailable as err:
            if settings.redis_url is not None:
                raise
            raise StoreUnavailable(f"{err}. Start `promptmill up`, or set redis_url", field="redis_url") from err


async def unless_asked(stop: StopRequest, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T | None:
    """Run ``work`` until it is done, a signal came, or the time ran out (TimeoutError).

    None after a signal: ``stop.by`` says which. What was not done is cancelled, and its clean-up waited for.
    """
    working = asyncio.create_task(work)
    asked = asyncio.create_task(stop.asked.wait())
    try:
        await asyncio.wait({working, asked}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        if not asked.done():
            raise TimeoutError
        return None
    finally:
        asked.cancel()
        if not working.done():
            working.cancel()
            ended = await asyncio.gather(working, return_exceptions=True)
            if isinstance(ended[0], Exception):
                raise ended[0]
