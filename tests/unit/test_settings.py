"""Configuration: what is read, what wins, and what a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from promptmill.contract import Timeouts, parse_request
from promptmill.errors import BadRequest, ConfigError
from promptmill.registry import Registry
from promptmill.routing import decide
from promptmill.settings import Settings, load_settings

EXAMPLE = """
redis_url = "redis://127.0.0.1:6379/0"
[models.sonnet]
type = "anthropic_api"
model_name = "claude-sonnet-4-6"
api_key_env = "SOME_KEY"
[models.ollama]
type = "local_openai"
api_url = "http://127.0.0.1:11434/v1/"
host_type = "openai"
model_name = "llama3.2"
timeouts = { connect_s = 5, first_token_s = 120, idle_s = 30, total_s = 600 }
[roles.chat]
primary = "sonnet"
backup_1 = "ollama"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "p.toml"
    path.write_text(text)
    return path


def test_the_documented_example_is_read(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, EXAMPLE))
    assert settings.models["ollama"].api_url == "http://127.0.0.1:11434/v1"
    assert settings.queue_url == settings.store_url == "redis://127.0.0.1:6379/0"
    assert settings.roles["chat"] == {"primary": "sonnet", "backup_1": "ollama"}
    assert set(settings.registry) == {"echo", "sonnet", "ollama"}


def test_arguments_win_over_the_environment_and_that_over_the_file(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path, "port = 1000\nconcurrency = 10\nworkers = 3\n")
    monkeypatch.setenv("PROMPTMILL_PORT", "2000")
    monkeypatch.setenv("PROMPTMILL_CONCURRENCY", "20")
    settings = load_settings(path, port=3000, workers=None)
    assert (settings.port, settings.concurrency, settings.workers) == (3000, 20, 3)


def test_the_file_is_found_by_variable_and_in_the_working_directory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings().config_file is None
    (tmp_path / "promptmill.toml").write_text("port = 1001\n")
    assert load_settings().port == 1001
    other = write(tmp_path, "port = 1002\n")
    monkeypatch.setenv("PROMPTMILL_CONFIG", str(other))
    assert load_settings().port == 1002


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("port = 99999", "port", "65535"),
        ("prot = 80", "prot", "no such setting"),
        ('redis_url = "http://x"', "redis_url", "redis://"),
        ('broker_url = "kafka://x"', "broker_url", "amqp://"),
        (
            '[models.a]\ntype = "gpt"',
            "models.a.type",
            "known: anthropic_api, claude_cli, echo, gemini_api, gemini_cli, local_openai",
        ),
        ('[models.a]\ntype = "local_openai"\nmodel_name = "m"', "models.a", "needs api_url"),
        ('[models.a]\ntype = "anthropic_api"', "models.a", "needs model_name"),
        ('[models.a]\ntype = "echo"\napi_url = "ftp://x"', "models.a.api_url", "http://"),
        ('[models.a]\ntype = "echo"\napikey = "x"', "models.a.apikey", "no such setting"),
        ('[models.a]\ntype = "echo"\napi_key_env = "A"\napi_key_file = "b"', "models.a", "not both"),
        ('[models."a b"]\ntype = "echo"', "models.a b", "pattern"),
        ('[roles.chat]\nprimary = "nobody"', "", "roles.chat.primary: there is no model 'nobody'"),
        ('[roles.chat]\nsecond = "echo"', "", "a slot is named primary"),
        ('[roles.chat]\nbackup_1 = "echo"', "", "primary is missing"),
        ('default_model = "nobody"', "", "there is no model 'nobody'"),
        ("timeouts = { idle_s = -1 }", "timeouts.idle_s", "greater than 0"),
        ("[api_keys.bob]", "api_keys.bob", "key_env or key_file"),
    ],
)
def test_a_mistake_names_file_key_and_reason(tmp_path: Path, text: str, key: str, reason: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert str(path) in caught.value.message
    assert key in caught.value.message
    assert reason in caught.value.message
    assert caught.value.code == "bad_config"


def test_a_file_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_settings(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="not TOML"):
        load_settings(write(tmp_path, "a = ["))
    (tmp_path / "p.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings(tmp_path / "p.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path)


def test_a_mistake_in_the_environment_is_told(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROMPTMILL_PORT", "many")
    with pytest.raises(ConfigError, match="port"):
        load_settings()
    monkeypatch.delenv("PROMPTMILL_PORT")
    monkeypatch.setenv("PROMPTMILL_MODELS", "{")
    with pytest.raises(ConfigError, match="PROMPTMILL_"):
        load_settings()


def test_a_secret_is_read_when_needed_and_a_missing_one_is_named(tmp_path: Path, monkeypatch) -> None:
    settings = load_settings(write(tmp_path, EXAMPLE))
    with pytest.raises(ConfigError, match="SOME_KEY"):
        settings.models["sonnet"].secret()
    monkeypatch.setenv("SOME_KEY", " s3cret\n")
    assert settings.models["sonnet"].secret() == "s3cret"
    assert "s3cret" not in repr(settings)
    assert settings.models["ollama"].secret() is None


def test_gateway_keys_come_by_user(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "bob.key").write_text("bobs\n")
    path = write(tmp_path, f'api_key = "mine"\n[api_keys.bob]\nkey_file = "{tmp_path}/bob.key"\n')
    assert load_settings(path).keys_by_user() == {"default": "mine", "bob": "bobs"}


def test_timeouts_are_the_requests_then_the_models_then_the_settings(tmp_path: Path) -> None:
    settings = load_settings(
        write(tmp_path, "timeouts = { idle_s = 7, total_s = 8 }\n" + EXAMPLE.replace("redis_url", "#"))
    )
    bounds = settings.timeouts_for(settings.models["ollama"], Timeouts(total_s=9))
    assert (bounds.connect_s, bounds.idle_s, bounds.total_s) == (5, 30, 9)
    assert settings.timeouts_for(settings.models["sonnet"], Timeouts()).idle_s == 7


SETTINGS = Settings.model_validate(
    {
        "models": {"a": {"type": "echo"}, "b": {"type": "echo"}},
        "roles": {"chat": {"primary": "b", "backup_1": "a"}},
    }
)
PROGRAM = Settings.model_validate({"models": {"g": {"type": "gemini_cli", "model_name": "m"}}})
API = Settings.model_validate({"models": {"h": {"type": "gemini_api", "model_name": "m"}}})


@pytest.mark.parametrize(
    ("settings", "asked", "answers"),
    [
        (SETTINGS, {"model": "b"}, "b"),
        (SETTINGS, {"model": "echo"}, "echo"),
        (SETTINGS, {"role": "chat"}, "b"),
        (SETTINGS, {"role": "chat", "slot": "backup_1"}, "a"),
        (SETTINGS, {}, "a"),
        (SETTINGS.model_copy(update={"default_model": "b"}), {}, "b"),
        (Settings(), {}, "echo"),
        (PROGRAM, {"model": "gemini_cli"}, "g"),
        (PROGRAM, {"model": "gemini_api"}, "g"),
        (PROGRAM.model_copy(update={"models": PROGRAM.models | API.models}), {"model": "gemini_api"}, "h"),
    ],
)
def test_the_route_is_as_the_table_says(settings: Settings, asked: dict[str, str], answers: str) -> None:
    assert decide(Registry.of(settings), parse_request({"prompt": "x", **asked})).first.name == answers


@pytest.mark.parametrize(
    ("asked", "code", "lists"),
    [
        ({"model": "c"}, "unknown_model", "a, b"),
        ({"role": "draw"}, "unknown_role", "chat"),
    ],
)
def test_an_unknown_name_lists_what_there_is(asked: dict[str, str], code: str, lists: str) -> None:
    with pytest.raises(BadRequest) as caught:
        decide(Registry.of(SETTINGS), parse_request({"prompt": "x", **asked}))
    assert caught.value.code == code
    assert lists in caught.value.message


def test_a_family_is_its_models_own_or_its_types_and_sized_by_its_setting() -> None:
    settings = Settings.model_validate(
        {
            "models": {
                "c": {"type": "claude_cli"},
                "g": {"type": "gemini_cli", "model_name": "m"},
                "e": {"type": "echo", "family": "lab"},
            },
            "families": {"lab": {"workers": 3, "concurrency": 5}, "gemini": {"concurrency": 2}},
            "concurrency": 70,
        }
    )
    assert settings.served_families == ["api", "claude", "gemini", "lab"]
    assert [settings.workers_of(f) for f in settings.served_families] == [1, 1, 1, 3]
    assert [settings.concurrency_of(f) for f in settings.served_families] == [70, 8, 2, 5]
    without = settings.model_copy(update={"workers": 0})
    assert [without.workers_of(f) for f in without.served_families] == [0, 0, 0, 3]
