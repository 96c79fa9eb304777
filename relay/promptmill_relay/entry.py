"""What ``python -m promptmill_relay`` and ``python -m promptmill_gateway`` have in common."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Final

from promptmill.errors import PromptmillError
from promptmill.lifeline import watch_lifeline
from promptmill.settings import load_settings
from promptmill_relay.server import OpenService, run

EXIT_CODES: Final = {"bad_config": 3, "store_unavailable": 4, "port_in_use": 6}
EXIT_INTERRUPTED: Final = 130


def main(name: str, open_service: OpenService, argv: Sequence[str] | None = None) -> int:
    """Read the arguments and the configuration, serve until told to stop, and say in one line what went wrong.

    Answers the exit code: 0 after a clean end, else as :data:`EXIT_CODES` says, 1 for what it does not name.
    """
    watch_lifeline()
    parser = argparse.ArgumentParser(prog=f"promptmill {name}")
    parser.add_argument("--config", help="the configuration file (default: promptmill.toml where it exists)")
    parser.add_argument("--host", help="the address to listen on; other than loopback needs an API key")
    parser.add_argument("--port", type=int, help="the port to listen on; 0 takes a free one")
    given = parser.parse_args(argv)
    try:
        settings = load_settings(given.config, host=given.host, port=given.port)
        _log_to_stderr(settings.log_level)
        run(name, settings, open_service)
    except PromptmillError as err:
        sys.stderr.write(f"promptmill {name}: {err.message} [{err.code}]\n")
        return EXIT_CODES.get(err.code, 1)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    if level != "debug":
        # uvicorn tells each step of starting and stopping; we say it once ourselves.
        logging.getLogger("uvicorn").setLevel(logging.WARNING)
