"""As it says, on a cluster."""

from tests.conformance.test_late_acts import *  # noqa: F403 - the tests and their fixtures
