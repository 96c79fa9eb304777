"""On a cluster."""

from tests.cluster.again import again
from tests.integration import test_job_life as original

globals().update(
    again(
        original,
        only={
            "test_a_submit_that_dies_before_its_message_is_sent_has_made_a_job_that_runs",
            "test_a_submit_that_dies_before_its_record_leaves_nothing",
        },
    )
)
