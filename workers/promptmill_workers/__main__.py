"""``python -m promptmill_workers``: one worker process."""

from __future__ import annotations

import argparse
import logging
import sys

from promptmill.errors import PromptmillError
from promptmill.settings import load_settings

EXIT_STORE = 5
EXIT_CONFIG = 6


def main(argv: list[str] | None = None) -> int:
    """Run a worker; answers the exit code: 0 stopped, 5 no store, 6 configuration, 7 the broker was given up."""
    parser = argparse.ArgumentParser(prog="promptmill worker", description="Run one worker process.")
    parser.add_argument("--name", default="worker", help="shown in logs and heartbeats")
    parser.add_argument("--config", help="path of promptmill.toml")
    parser.add_argument("--concurrency", type=int, help="jobs at a time")
    args = parser.parse_args(argv)
    try:
        settings = load_settings(args.config, concurrency=args.concurrency)
        logging.basicConfig(
            level=settings.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        from promptmill_workers.process import run_worker  # noqa: PLC0415 - configuration errors need no Celery

        return run_worker(settings, args.name)
    except ImportError as err:
        if (err.name or "").startswith("promptmill"):
            raise
        print(f'error [missing_extra]: {err}; pip install "promptmill[workers]"', file=sys.stderr)  # noqa: T201
        return EXIT_CONFIG
    except PromptmillError as err:
        print(f"error [{err.code}]: {err}", file=sys.stderr)  # noqa: T201
        return EXIT_STORE if err.code == "store_unavailable" else EXIT_CONFIG


if __name__ == "__main__":
    sys.exit(main())
