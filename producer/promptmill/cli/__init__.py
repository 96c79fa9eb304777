"""The command line. ``main`` is the entry point; it says what to install where the extra ``cli`` is missing."""

from __future__ import annotations

import sys

from promptmill.extras import EXTRAS, missing_modules


def main() -> None:
    """Run the command line and exit with a code of :mod:`promptmill.cli.exits`."""
    missing = missing_modules("cli")
    if missing:
        sys.stderr.write(f'error [missing_extra]: {", ".join(missing)} not installed: pip install "promptmill[cli]"\n')
        sys.exit(6)
    from promptmill.cli.app import run  # noqa: PLC0415 - imports what may be missing

    sys.exit(run(sys.argv[1:]))


__all__ = ["EXTRAS", "main"]
