"""``promptmill flower``: Flower, the monitor of Celery, at our broker."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Annotated

import typer

from promptmill.errors import ConfigError
from promptmill.extras import require_extras
from promptmill.live import families_of
from promptmill.settings import Settings
from promptmill.up.listen import bind, is_loopback, url_of
from promptmill.up.signals import stop_on_signals

from . import exits
from .common import ConfigOption, DataDirOption, client_settings
from .output import note


def flower(
    *,
    host: Annotated[str | None, typer.Option(help="The address; other than loopback needs a login.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Run Flower, read only: workers, queues and jobs in a browser. TERM or Ctrl-C ends it."""
    require_extras("flower")
    given = {"flower_host": host, "flower_port": port}
    settings = client_settings(config, data_dir)
    settings = settings.model_copy(update={name: value for name, value in given.items() if value is not None})
    _check(settings)
    from promptmill.logs import set_up_logs  # noqa: PLC0415 - needs the extra

    set_up_logs(settings, "flower")
    with bind(settings.flower_host, settings.flower_port) as listener:
        asyncio.run(_serve(settings, listener))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by the interpreter's own end: it would wait for threads that wait for a broker which may not answer.
    os._exit(exits.OK)


def _check(settings: Settings) -> None:
    if bool(settings.flower_user) != bool(settings.flower_password):
        missing = "flower_user" if settings.flower_password else "flower_password"
        raise ConfigError(f"{missing}: a login needs both flower_user and flower_password", field=missing)
    if settings.flower_user and ":" in settings.flower_user:
        raise ConfigError("flower_user: a name must not contain a colon", field="flower_user")
    if not settings.flower_password and not is_loopback(settings.flower_host):
        raise ConfigError(
            f"flower_host {settings.flower_host}: other machines could look at the jobs without a login; set "
            "flower_user and flower_password, or listen on 127.0.0.1",
            field="flower_host",
        )


async def _serve(settings: Settings, listener: socket.socket) -> None:
    from promptmill.flower_app import serve  # noqa: PLC0415 - needs the extra

    families = await families_of(settings)
    with stop_on_signals() as stop:
        note(f"Flower listens on {url_of(listener)}")
        await serve(settings, families, listener, stop.asked)
