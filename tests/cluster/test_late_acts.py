"""On a cluster."""

from tests.cluster.again import again
from tests.conformance import test_late_acts as original

globals().update(
    again(
        original,
        without={"test_an_act_whose_reply_was_lost_is_done_once_and_answered_as_if_it_had_come": "for one server"},
    )
)
