"""On a cluster."""

from tests.cluster.again import again
from tests.integration import test_worker as original

globals().update(
    again(
        original,
        only={
            "test_a_job_runs_and_its_tokens_are_its_text",
            "test_a_killed_workers_job_is_picked_up_and_the_text_begins_anew",
            "test_a_frozen_worker_that_wakes_writes_nothing_more",
            "test_past_the_drain_limit_a_job_is_handed_back_at_once",
            "test_a_cancelled_job_ends_at_once_and_its_connection_is_closed",
            "test_a_job_expires_unstarted_even_without_any_worker",
            "test_jobs_are_listed_newest_first_by_user_and_page",
            "test_no_corpse_is_left_by_a_worker_that_ended_well",
        },
    )
)
