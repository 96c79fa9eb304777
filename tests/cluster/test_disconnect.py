"""On a cluster."""

from tests.cluster.again import again
from tests.integration import test_disconnect as original

globals().update(again(original))
