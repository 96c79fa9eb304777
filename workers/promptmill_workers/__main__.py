"""``python -m promptmill_workers``: one worker process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from promptmill.cli import exits
from promptmill.errors import PromptmillError
from promptmill_workers.entry import read_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run a worker until it is told to stop; answers the exit code, one of :mod:`promptmill.cli.exits`."""
    try:
        settings, name, family = read_arguments(argv, "promptmill worker")
        from promptmill_workers.process import run_worker  # noqa: PLC0415 - needs the extra

        return run_worker(settings, name, family)
    except PromptmillError as err:
        sys.stderr.write(f"error [{err.code}]: {err.message}\n")
        return exits.exit_code(err)


if __name__ == "__main__":
    sys.exit(main())
