"""``python -m promptmill_relay [--config P] [--host H] [--port N]``."""

import sys

from promptmill_relay.entry import main

if __name__ == "__main__":
    sys.exit(main("relay", "promptmill_relay.app"))
