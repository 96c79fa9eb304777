"""On a cluster."""

from tests.cluster.again import again
from tests.integration import test_store_faults as original

globals().update(again(original, only={"test_an_outage_of_any_length_that_all_see_kills_nobody"}))
