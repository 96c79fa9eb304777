"""On a cluster."""

from tests.cluster.again import again
from tests.conformance import test_event_log as original

globals().update(again(original))
