"""``python -m ops.fuzz TARGET``: fuzz for as long as you like; exit code 0 only if nothing was found.

``gateway`` asks a running gateway what its OpenAPI document says, right and wrong; ``http`` sends it bytes that are
hardly HTTP. The others read bytes: ``sse`` and ``lines`` are the framers, ``relay`` the encoder of events, the rest the
decoders of what providers (``openai``, ``anthropic``) and programs (``claude``, ``gemini``, ``gemini-text``) write.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from typing import Final

BYTES: Final = ("sse", "lines", "relay", "openai", "anthropic", "claude", "gemini", "gemini-text")
_ROUND: Final = 300


def main() -> int:
    """Parse the arguments and run one target."""
    parser = argparse.ArgumentParser(prog="python -m ops.fuzz", description=__doc__)
    parser.add_argument("target", choices=["gateway", "http", *BYTES])
    parser.add_argument("--seconds", type=int, default=60, help="how long (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="where chance begins (default %(default)s)")
    parser.add_argument("--directory", type=Path, default=Path("/tmp/promptmill-fuzz"), help="for inputs (%(default)s)")
    options = parser.parse_args()
    if options.target in BYTES:
        from ops.fuzz.coverage import run  # noqa: PLC0415 - needs an extra of its own

        options.directory.mkdir(parents=True, exist_ok=True)
        run(options.target, options.seconds, options.seed, options.directory)
    return _ask(options.target, options.seconds, options.seed)


def _ask(target: str, seconds: float, seed: int) -> int:
    from ops.fuzz import gateway, http  # noqa: PLC0415 - needs an extra of its own

    asked = 0
    until = time.monotonic() + seconds
    with gateway.running() as running:
        try:
            while time.monotonic() < until:
                if target == "http":
                    asked += http.fuzz(running.port, examples=_ROUND, seed=seed, until=until)
                else:
                    for operation in gateway.operations(running).values():
                        asked += gateway.fuzz(running, operation, examples=_ROUND, seed=seed, until=until)
                seed += 1
        except (Exception, gateway.FailureGroup):  # noqa: BLE001 - whatever was found is shown
            traceback.print_exc()
            return 1
        complaints = running.complaints()
    print(f"{target}: {asked} requests, {len(complaints)} complaints in the gateway's log")
    print("\n".join(complaints))
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
