"""On a cluster."""

from tests.cluster.again import again
from tests.integration import test_relay as original

globals().update(again(original))
