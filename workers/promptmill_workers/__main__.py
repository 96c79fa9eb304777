"""``python -m promptmill_workers``: one worker process."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence

from promptmill.cli import exits
from promptmill.errors import ConfigError, PromptmillError
from promptmill.extras import require_extras
from promptmill.live import families_of
from promptmill.queues import API_FAMILY
from promptmill.settings import Settings, load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker until it is told to stop; answers the exit code, one of :mod:`promptmill.cli.exits`."""
    parser = argparse.ArgumentParser(prog="promptmill worker", description="Run one worker process.")
    parser.add_argument("--name", help="shown in logs and heartbeats (default: the family)")
    parser.add_argument("--config", help="the configuration file (default: promptmill.toml where it exists)")
    parser.add_argument("--family", default=API_FAMILY, help="whose jobs it runs: api (the default), claude, gemini …")
    parser.add_argument("--concurrency", type=int, help="jobs at a time")
    args = parser.parse_args(argv)
    try:
        settings = load_settings(args.config)
        if args.family not in settings.served_families:
            _check_live_family(settings, args.family)
        concurrency = args.concurrency or settings.concurrency_of(args.family)
        settings = settings.model_copy(update={"concurrency": concurrency})
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        require_extras("workers")
        from promptmill_workers.process import run_worker  # noqa: PLC0415 - needs the extra

        return run_worker(settings, args.name or args.family, args.family)
    except PromptmillError as err:
        sys.stderr.write(f"error [{err.code}]: {err.message}\n")
        return exits.exit_code(err)


def _check_live_family(settings: Settings, family: str) -> None:
    """Raise ConfigError where none of the models that operators added has that family either."""
    known = asyncio.run(families_of(settings))
    if family not in known:
        raise ConfigError(f"--family {family}: no model belongs to it; there is: {', '.join(known)}", field="family")


if __name__ == "__main__":
    sys.exit(main())
