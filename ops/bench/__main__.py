"""Entry point of ``python -m ops.bench``."""

from __future__ import annotations

import sys

from ops.bench.run import main

if __name__ == "__main__":
    sys.exit(main())
