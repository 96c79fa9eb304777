"""What the worker's entry points read from their command line."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence

from promptmill.errors import ConfigError
from promptmill.extras import require_extras
from promptmill.live import families_of
from promptmill.queues import API_FAMILY
from promptmill.settings import Settings, load_settings


def read_arguments(argv: Sequence[str] | None, program: str) -> tuple[Settings, str, str]:
    """Settings, name and family; logging is set up by them.

    Raises
    ------
    ConfigError
        The configuration is wrong, or no model has the family.
    """
    parser = argparse.ArgumentParser(prog=program, description="Run one worker process.")
    parser.add_argument("--name", help="shown in logs and heartbeats (default: the family)")
    parser.add_argument("--config", help="the configuration file (default: promptmill.toml where it exists)")
    parser.add_argument("--family", default=API_FAMILY, help="whose jobs it runs: api (the default), claude, gemini …")
    parser.add_argument("--concurrency", type=int, help="jobs at a time")
    args = parser.parse_args(argv)
    settings = load_settings(args.config)
    if args.family not in settings.served_families:
        _check_live_family(settings, args.family)
    concurrency = args.concurrency or settings.concurrency_of(args.family)
    settings = settings.model_copy(update={"concurrency": concurrency})
    name = args.name or args.family
    require_extras("workers")
    from promptmill.logs import set_up_logs  # noqa: PLC0415 - needs the extra

    set_up_logs(settings, name)
    return settings, name, args.family


def _check_live_family(settings: Settings, family: str) -> None:
    """Raise ConfigError where none of the models that operators added has that family either."""
    known = asyncio.run(families_of(settings))
    if family not in known:
        raise ConfigError(f"--family {family}: no model belongs to it; there is: {', '.join(known)}", field="family")
