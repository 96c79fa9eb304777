"""What ``python -m promptmill_relay`` and ``python -m promptmill_gateway`` have in common."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from promptmill.cli import exits
from promptmill.errors import PromptmillError
from promptmill.extras import require_extras
from promptmill.lifeline import watch_lifeline
from promptmill.settings import Settings, load_settings


def main(name: str, app_module: str, argv: Sequence[str] | None = None) -> int:
    """Read the arguments and the configuration, serve until told to stop, and say in one line what went wrong.

    ``app_module`` has the ``open_<name>`` of the service; it is imported only here, where its extra is known to be
    installed. Answers the exit code, one of :mod:`promptmill.cli.exits`.
    """
    watch_lifeline()
    parser = argparse.ArgumentParser(prog=f"promptmill {name}")
    parser.add_argument("--config", help="the configuration file (default: promptmill.toml where it exists)")
    parser.add_argument("--host", help="the address to listen on; other than loopback needs an API key")
    parser.add_argument("--port", type=int, help="the port to listen on; 0 takes a free one")
    given = parser.parse_args(argv)
    try:
        settings = load_settings(given.config, host=given.host, port=given.port)
        require_extras(name)
        _set_up_logs(name, settings)
        from promptmill_relay.server import run  # noqa: PLC0415 - needs the extra

        run(name, settings, getattr(import_module(app_module), f"open_{name}"))
    except PromptmillError as err:
        sys.stderr.write(f"error [{err.code}]: {err.message}\n")
        return exits.exit_code(err)
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    return exits.OK


def _set_up_logs(name: str, settings: Settings) -> None:
    from promptmill.logs import set_up_logs  # noqa: PLC0415 - needs the extra

    set_up_logs(settings, name)
    if settings.log_level != "debug":
        # It tells each step of starting and stopping, which we say once ourselves, and warns of every bad request: with
        # that anybody could fill the log.
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
