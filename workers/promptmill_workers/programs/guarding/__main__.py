"""``PYTHON -I -S __main__.py FD ROOT``: a warden. FD is its end of the socket to the worker; see :mod:`.warden`."""

import os
import sys

if __name__ == "__main__":
    # -I leaves this directory out, and the packages around it would import all of the worker.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    __import__("guarding.warden", fromlist=["main"]).main(int(sys.argv[1]), sys.argv[2])
