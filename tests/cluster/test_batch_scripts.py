"""As it says, on a cluster."""

from tests.conformance.test_batch_scripts import *  # noqa: F403 - the tests and their fixtures
