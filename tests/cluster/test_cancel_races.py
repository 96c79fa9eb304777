"""On a cluster."""

from tests.cluster.again import again
from tests.integration import test_cancel_races as original

globals().update(
    again(original, without={"test_against_the_claim_the_cancel_always_holds": "there the cancel is always first"})
)
