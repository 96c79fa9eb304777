"""``python -m promptmill_gateway [--config P] [--host H] [--port N]``."""

import sys

from promptmill_relay.entry import main

if __name__ == "__main__":
    sys.exit(main("gateway", "promptmill_gateway.app"))
