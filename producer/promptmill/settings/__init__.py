"""Configuration: ``promptmill.toml`` and ``PROMPTMILL_*``, validated once at an entry point and passed down frozen.

The environment wins over the file, arguments over both. No module outside of this package reads the environment.
"""

from promptmill.settings.main import Settings, load_settings
from promptmill.settings.parts import (
    DEFAULT_TIMEOUTS,
    FAMILIES,
    LOOPBACK,
    PROGRAM_FAMILIES,
    ApiKey,
    Budget,
    FamilyConfig,
    ModelConfig,
    ModelLimits,
    ModelName,
    Price,
    UserConfig,
    read_secret,
)
from promptmill.settings.process import (
    addresses_to_hand_on,
    child_environment,
    default_data_dir,
    lifeline_fd,
    listen_fd,
)

__all__ = [
    "DEFAULT_TIMEOUTS",
    "FAMILIES",
    "LOOPBACK",
    "PROGRAM_FAMILIES",
    "ApiKey",
    "Budget",
    "FamilyConfig",
    "ModelConfig",
    "ModelLimits",
    "ModelName",
    "Price",
    "Settings",
    "UserConfig",
    "addresses_to_hand_on",
    "child_environment",
    "default_data_dir",
    "lifeline_fd",
    "listen_fd",
    "load_settings",
    "read_secret",
]
