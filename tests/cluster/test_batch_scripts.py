"""On a cluster."""

from tests.cluster.again import again
from tests.conformance import test_batch_scripts as original

globals().update(again(original))
