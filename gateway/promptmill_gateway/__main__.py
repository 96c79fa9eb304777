"""``python -m promptmill_gateway [--config P] [--host H] [--port N]``."""

import sys

from promptmill.errors import MissingExtra

try:
    from promptmill_gateway.app import open_gateway
    from promptmill_relay.entry import main
except ModuleNotFoundError as err:
    raise SystemExit(str(MissingExtra(f'{err.name} is not installed: pip install "promptmill[gateway]"'))) from None

if __name__ == "__main__":
    sys.exit(main("gateway", open_gateway))
