"""As it says, on a cluster."""

from tests.conformance.test_event_log import *  # noqa: F403 - the tests and their fixtures
