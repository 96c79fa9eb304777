"""Secrets as files: which settings, what a mistake is told, and that a child is handed no secret it can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptmill.errors import ConfigError
from promptmill.settings import Settings, addresses_to_hand_on, child_environment, load_settings
from promptmill.settings.secrets import SECRETS

PASSWORD = "p@ss:w/rd%"
QUOTED = "p%40ss%3Aw%2Frd%25"


def secret(tmp_path: Path, text: str | bytes, name: str = "secret") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_every_secret_can_be_a_file_named_by_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "redis_url": "redis://store:6379/0",
        "redis_password": "one",
        "broker_url": "amqp://mill@broker//",
        "broker_password": "two",
        "api_key": " k e y ",
        "signing_key": "four",
        "flower_password": "five",
        "flower_broker_api": "http://user:six@broker:15672/api/",
    }
    assert set(values) == set(SECRETS) <= set(Settings.model_fields)
    for name, value in values.items():
        monkeypatch.setenv(f"PROMPTMILL_{name.upper()}_FILE", str(secret(tmp_path, f"{value}\n", name)))
    settings = load_settings()
    assert settings.redis_url == "redis://:one@store:6379/0"
    assert settings.broker_url == "amqp://mill:two@broker//"
    # One newline is the editor's; everything else is the secret's own.
    assert (settings.api_key, settings.signing_key, settings.flower_password) == (" k e y ", "four", "five")
    assert settings.flower_broker_api == values["flower_broker_api"]


def test_the_configuration_file_names_them_too_and_the_environment_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "p.toml"
    config.write_text(f'redis_url = "redis://h"\nredis_password_file = "{secret(tmp_path, PASSWORD)}"\n')
    assert load_settings(config).redis_url == f"redis://:{QUOTED}@h"
    monkeypatch.setenv("PROMPTMILL_REDIS_PASSWORD", "other")
    assert load_settings(config).redis_url == "redis://:other@h"


@pytest.mark.parametrize(
    ("url", "whole"),
    [
        ("redis://h:6379/2", f"redis://:{QUOTED}@h:6379/2"),
        ("rediss://user@h:6379/0", f"rediss://user:{QUOTED}@h:6379/0"),
        ("redis://user:@h", f"redis://user:{QUOTED}@h"),
        ("redis://[::1]:6379", f"redis://:{QUOTED}@[::1]:6379"),
        ("unix:///run/redis.sock?db=1", f"unix://:{QUOTED}@/run/redis.sock?db=1"),
        ("redis://:its-own@h", "redis://:its-own@h"),
    ],
)
def test_a_password_is_put_into_an_address_that_has_none(url: str, whole: str) -> None:
    assert Settings(redis_url=url, redis_password=PASSWORD).redis_url == whole


@pytest.mark.parametrize("server", ["redis", "broker"])
def test_a_password_without_an_address_is_refused(server: str) -> None:
    with pytest.raises(ConfigError, match=f"{server}_password is for the address in {server}_url") as caught:
        load_settings(**{f"{server}_password": PASSWORD})
    assert PASSWORD not in caught.value.message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        ("", "is empty"),
        (" \n", "is empty"),
        (b"hidden\xff", "not UTF-8"),
        ("hidden" * 20_000, "too long for a secret"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_its_variable_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | bytes | None, reason: str
) -> None:
    path = tmp_path / "secret" if content is None else secret(tmp_path, content)
    monkeypatch.setenv("PROMPTMILL_API_KEY_FILE", str(path))
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert caught.value.field == "PROMPTMILL_API_KEY_FILE"
    assert caught.value.message.startswith(
        f"PROMPTMILL_API_KEY_FILE: {'cannot read ' if content is None else ''}{path}"
    )
    assert reason in caught.value.message
    assert "hidden" not in caught.value.message


def test_a_directory_and_an_empty_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMPTMILL_SIGNING_KEY_FILE", str(tmp_path))
    with pytest.raises(ConfigError, match="Is a directory"):
        load_settings()
    monkeypatch.setenv("PROMPTMILL_SIGNING_KEY_FILE", "")
    with pytest.raises(ConfigError, match="PROMPTMILL_SIGNING_KEY_FILE is empty: name a file, or leave it out"):
        load_settings()


def test_a_value_and_its_file_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = secret(tmp_path, "hidden")
    config = tmp_path / "p.toml"
    config.write_text(f'api_key = "hidden"\napi_key_file = "{path}"\n')
    with pytest.raises(ConfigError, match=r"p\.toml: give api_key or api_key_file, not both") as in_file:
        load_settings(config)
    monkeypatch.setenv("PROMPTMILL_API_KEY", "hidden")
    monkeypatch.setenv("PROMPTMILL_API_KEY_FILE", str(path))
    with pytest.raises(ConfigError, match="give PROMPTMILL_API_KEY or PROMPTMILL_API_KEY_FILE, not both") as in_env:
        load_settings()
    assert "hidden" not in in_file.value.message + in_env.value.message


def test_what_is_no_path_and_what_is_no_secret_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "p.toml"
    config.write_text("api_key_file = 7\n")
    with pytest.raises(ConfigError, match="api_key_file: must be the path of a file"):
        load_settings(config)
    config.write_text(f'host_file = "{secret(tmp_path, "localhost")}"\n')
    with pytest.raises(ConfigError, match="host_file: no such setting"):
        load_settings(config)


def test_a_child_is_not_handed_an_address_that_it_reads_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTMILL_REDIS_URL", "redis://store:6379/0")
    monkeypatch.setenv("PROMPTMILL_REDIS_PASSWORD_FILE", str(secret(tmp_path, PASSWORD)))
    settings = load_settings()
    for broker in (None, settings.redis_url):
        handed = addresses_to_hand_on(None, settings.redis_url, broker)
        assert QUOTED not in str(child_environment(handed))
        assert handed == {}
    # Another store than the configured one: that of an `up`, for instance.
    assert addresses_to_hand_on(None, "redis://other", None) == {"redis_url": "redis://other"}


def test_a_child_that_is_handed_an_address_is_not_handed_its_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTMILL_REDIS_URL_FILE", str(secret(tmp_path, "redis://store")))
    handed = child_environment(addresses_to_hand_on(None, "redis://other", "redis://other"))
    assert handed["PROMPTMILL_REDIS_URL"] == handed["PROMPTMILL_BROKER_URL"] == "redis://other"
    assert "PROMPTMILL_REDIS_URL_FILE" not in handed


def test_passwords_do_not_stand_in_what_settings_print() -> None:
    settings = Settings(redis_url="redis://h", redis_password=PASSWORD, broker_url="amqp://h", broker_password="hid")
    assert f"'{PASSWORD}'" not in repr(settings)
    assert "broker_password" not in repr(settings)
