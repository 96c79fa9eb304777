"""On a cluster."""

from tests.cluster.again import again
from tests.integration import test_usage_ledger as original

globals().update(again(original))
