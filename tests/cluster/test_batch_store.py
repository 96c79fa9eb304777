"""As it says, on a cluster."""

from tests.integration.test_batch_store import *  # noqa: F403 - the tests and their fixtures
