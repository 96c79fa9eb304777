"""``python -m promptmill_workers``: one worker process."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from promptmill.cli import exits
from promptmill.errors import PromptmillError
from promptmill.extras import require_extras
from promptmill.settings import load_settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker until it is told to stop; answers the exit code, one of :mod:`promptmill.cli.exits`."""
    parser = argparse.ArgumentParser(prog="promptmill worker", description="Run one worker process.")
    parser.add_argument("--name", default="worker", help="shown in logs and heartbeats (default: worker)")
    parser.add_argument("--config", help="the configuration file (default: promptmill.toml where it exists)")
    parser.add_argument("--concurrency", type=int, help="jobs at a time")
    args = parser.parse_args(argv)
    try:
        settings = load_settings(args.config, concurrency=args.concurrency)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        require_extras("workers")
        from promptmill_workers.process import run_worker  # noqa: PLC0415 - needs the extra

        return run_worker(settings, args.name)
    except PromptmillError as err:
        sys.stderr.write(f"error [{err.code}]: {err.message}\n")
        return exits.exit_code(err)


if __name__ == "__main__":
    sys.exit(main())
