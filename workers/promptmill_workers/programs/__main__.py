"""``python -m promptmill_workers.programs``: one line of JSON on how firmly this machine lets programs be held.

``{"level": "pidns", "levels": {"pidns": "ok", "cgroup": WHY NOT, …}}``, best first; exit code 0, or 1 with ``level``
null where none works.
"""

from __future__ import annotations

import asyncio
import json
import sys

from promptmill.errors import PromptmillError
from promptmill_workers.programs.levels import probe_all


def main() -> int:
    """Print what the levels' probes say; answers the exit code."""
    try:
        levels = asyncio.run(probe_all())
    except PromptmillError as err:
        levels = {"error": err.message}
    level = next((name for name, result in levels.items() if result == "ok"), None)
    sys.stdout.write(json.dumps({"level": level, "levels": levels}) + "\n")
    return 0 if level else 1


if __name__ == "__main__":
    sys.exit(main())
