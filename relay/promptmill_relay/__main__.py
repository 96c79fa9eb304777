"""``python -m promptmill_relay [--config P] [--host H] [--port N]``."""

import sys

from promptmill.errors import MissingExtra

try:
    from promptmill_relay.app import open_relay
    from promptmill_relay.entry import main
except ModuleNotFoundError as err:
    raise SystemExit(str(MissingExtra(f'{err.name} is not installed: pip install "promptmill[relay]"'))) from None

if __name__ == "__main__":
    sys.exit(main("relay", open_relay))
