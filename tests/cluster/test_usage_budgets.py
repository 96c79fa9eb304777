"""As it says, on a cluster."""

from tests.integration.test_usage_budgets import *  # noqa: F403 - the tests and their fixtures
