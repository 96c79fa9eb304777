"""On a cluster."""

from tests.cluster.again import again
from tests.integration import test_reading as original

globals().update(again(original, without={"test_a_hub_without_readers_keeps_its_connection": "it has none there"}))
