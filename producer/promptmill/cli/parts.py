"""``promptmill worker``, ``relay`` and ``gateway``: become the program, with the store that ``run`` would use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from promptmill.extras import require_extras
from promptmill.settings import addresses_to_hand_on, child_environment

from .common import ConfigOption, DataDirOption, client_settings
from .up import HostOption, PortOption


def worker(
    *,
    name: Annotated[str | None, typer.Option(help="The worker's name (default: made from host and pid).")] = None,
    family: Annotated[str | None, typer.Option(help="Whose jobs it runs: api (the default), claude, gemini …")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, max=10_000, help="Jobs at once.")] = None,
    config: ConfigOption = None,
    data_dir: DataDirOption = None,
) -> None:
    """Run one worker process of one family. TERM drains it; a second TERM ends it at once."""
    require_extras("workers")
    given = {"--name": name, "--family": family, "--concurrency": concurrency}
    arguments = tuple(str(part) for pair in given.items() if pair[1] is not None for part in pair)
    _become("promptmill_workers", arguments, config, data_dir)


def relay(
    *, host: HostOption = None, port: PortOption = None, config: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Run a relay alone: jobs' events as Server-Sent Events, read only."""
    require_extras("relay")
    _become("promptmill_relay", (), config, data_dir, host=host, port=port)


def gateway(
    *, host: HostOption = None, port: PortOption = None, config: ConfigOption = None, data_dir: DataDirOption = None
) -> None:
    """Run the gateway alone: the HTTP interface, with the relay in it."""
    require_extras("gateway")
    _become("promptmill_gateway", (), config, data_dir, host=host, port=port)


def _become(
    module: str, arguments: tuple[str, ...], config: Path | None, data_dir: Path | None, **overrides: str | int | None
) -> None:
    settings = client_settings(config, data_dir)
    shared = {**addresses_to_hand_on(settings.config_file, settings.redis_url, None), **overrides}
    config_arguments = ("--config", str(settings.config_file)) if settings.config_file else ()
    # Not a child: signals, the terminal and the exit status are then the program's own, and nothing can be orphaned.
    os.execve(  # noqa: S606 - no shell is the point
        sys.executable, [sys.executable, "-m", module, *arguments, *config_arguments], child_environment(shared)
    )
