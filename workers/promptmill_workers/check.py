"""``python -m promptmill_workers.check``: what this machine's workers could do, for ``promptmill doctor``.

Prints one JSON object: ``guard`` (the ``level`` used, null where it cannot be had; of each of ``levels`` ``ok`` or why
not) and ``models`` (of each
that runs a program or a plug-in: ``found``, and ``error`` with ``code`` and ``message`` where it cannot work). No
provider is asked and nothing is billed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from promptmill.errors import PromptmillError
from promptmill.settings import ModelConfig, Settings, load_settings
from promptmill_workers.isolated import make_backend
from promptmill_workers.programs import probe_all


@runtime_checkable
class ChecksLogin(Protocol):
    """A backend that can tell whether its credentials would do, without asking anybody."""

    def check_login(self) -> str:
        """What it would use, in words without a secret. Raises BackendError ``auth`` or ``auth_expired``."""
        ...


def _check(name: str, config: ModelConfig) -> dict[str, Any]:
    try:
        backend = make_backend(name, config)
        found = backend.check_login() if isinstance(backend, ChecksLogin) else "can be started"
    except PromptmillError as err:
        return {"error": {"code": err.code, "message": err.message}}
    return {"found": found}


async def _examine(settings: Settings) -> dict[str, Any]:
    models = {name: _check(name, config) for name, config in settings.models.items()}
    levels = await probe_all()
    wanted = [settings.guard_level] if settings.guard_level != "auto" else list(levels)
    level = next((name for name in wanted if levels[name] == "ok"), None)
    return {"guard": {"level": level, "levels": levels}, "models": models}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; answers 0, whatever they are."""
    parser = argparse.ArgumentParser(prog="python -m promptmill_workers.check", description="Look at this machine.")
    parser.add_argument("--config", help="the configuration file")
    args = parser.parse_args(argv)
    json.dump(asyncio.run(_examine(load_settings(args.config))), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
