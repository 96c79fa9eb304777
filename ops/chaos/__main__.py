"""Entry point of ``python -m ops.chaos``."""

from __future__ import annotations

import sys

from ops.chaos.run import main

if __name__ == "__main__":
    sys.exit(main())
