"""``promptmill up``."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from promptmill.settings import Settings, load_settings
from promptmill.up.signals import StopRequest, stop_on_signals
from promptmill.up.stack import Stack
from promptmill.up.tell import Teller

from . import exits
from .common import ConfigOption, DataDirOption, JsonOption, unless_asked
from .output import out, out_json

HostOption = Annotated[str | None, typer.Option(help="The gateway's address; other than loopback needs an API key.")]
PortOption = Annotated[int | None, typer.Option(min=0, max=65535, help="The gateway's port; 0 takes any free one.")]


def up(
    *,
    config: ConfigOption = None,
    host: HostOption = None,
    port: PortOption = None,
    workers: Annotated[int | None, typer.Option(min=0, max=256, help="Worker processes.")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, max=10_000, help="Jobs at once in each worker.")] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run everything: a store (unless redis_url is set), workers and the gateway.

    Prints `ready URL` on standard output as soon as a job can be claimed; --json prints one line with url, redis_url
    (with its password) and pids. All else goes to standard error. Ctrl-C or TERM lets running jobs finish; a second one
    ends at once. Nothing is left behind, however this process ends.
    """
    settings = load_settings(config, host=host, port=port, workers=workers, concurrency=concurrency, data_dir=data_dir)
    raise typer.Exit(asyncio.run(_up(settings, as_json=as_json)))


async def _up(settings: Settings, *, as_json: bool) -> int:
    tell = Teller()
    ready = asyncio.Event()

    async def serve(stop: StopRequest) -> None:
        async with Stack(settings, tell, hurry=stop.hurry) as stack:
            about = stack.about()
            if as_json:
                out_json({"url": about.url, "redis_url": about.redis_url, "pids": about.pids})
            else:
                out(f"ready {about.url}")
            ready.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                tell(
                    f"stopping: running jobs may finish within {settings.drain_s:g} s, then others take them over; "
                    "a second signal ends at once"
                )

    with stop_on_signals() as stop:
        try:
            # The first signal cancels it, once: leaving the stack ends its parts in order.
            await unless_asked(stop, serve(stop))
        finally:
            tell.close()
    return exits.OK if ready.is_set() else exits.INTERRUPTED
