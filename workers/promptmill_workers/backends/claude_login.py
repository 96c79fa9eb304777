"""What the ``claude`` program signs in with, read at each call.

Four kinds (``options.credential``): ``api_key`` and ``auth_token`` (a gateway's) and ``oauth_token`` (made by ``claude
setup-token``), each from ``api_key_env`` or ``api_key_file``; and ``login``, the access token in the file that a
logged-in ``claude`` keeps fresh. Only the configured one is handed on: a key in the worker's environment never
overrides it.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import orjson

from promptmill.errors import BackendError, ConfigError
from promptmill.settings import ModelConfig
from promptmill_workers.backends.options import secret_for_call

Kind = Literal["api_key", "auth_token", "oauth_token", "login"]

DEFAULT_FILE: Final = Path("~/.claude/.credentials.json")
_VARIABLES: Final[dict[Kind, str]] = {
    "api_key": "ANTHROPIC_API_KEY",
    "auth_token": "ANTHROPIC_AUTH_TOKEN",
    "oauth_token": "CLAUDE_CODE_OAUTH_TOKEN",
    "login": "CLAUDE_CODE_OAUTH_TOKEN",
}


@dataclass(frozen=True, slots=True)
class Credential:
    """A secret, and the program's variable for it."""

    variable: str
    secret: str


class Login:
    """The one credential of a model."""

    def __init__(self, name: str, config: ModelConfig, kind: Kind | None, file: Path | None) -> None:
        """Raises ConfigError where the kind does not fit what is configured, or the destination is doubtful."""
        key = bool(config.api_key_env or config.api_key_file)
        where = f"models.{name}.options.credential"
        if config.api_url and not key and kind is None and file is None:
            raise ConfigError(f"{where}: say what may travel to {config.api_url}", field=where)
        self.kind: Kind = kind or ("api_key" if key else "login")
        if (self.kind == "login") == key:
            wanted = "neither api_key_env nor api_key_file" if key else "api_key_env or api_key_file"
            raise ConfigError(f"{where}: {self.kind} needs {wanted}", field=where)
        if file is not None and self.kind != "login":
            field = f"models.{name}.options.credentials_file"
            raise ConfigError(f"{field}: only a login is read from there, not an {self.kind}", field=field)
        self._name = name
        self._config = config
        self._file = (file or DEFAULT_FILE).expanduser()

    @property
    def renewable(self) -> bool:
        """Whether it is a person's login, which ends and is renewed by that person."""
        return self.kind in {"login", "oauth_token"}

    def read(self) -> Credential:
        """The credential as it is now.

        Raises
        ------
        BackendError
            ``auth``: the key cannot be read. ``auth_expired``: there is no login, or its time is over.
        """
        if self.kind == "login":
            return Credential(_VARIABLES[self.kind], self._access_token())
        return Credential(_VARIABLES[self.kind], secret_for_call(self._name, self._config) or "")

    def fingerprint(self) -> str | None:
        """Changes when the file that holds the login changes; None where no file can renew it."""
        file = self._file if self.kind == "login" else self._config.api_key_file
        if not self.renewable or file is None:
            return None
        try:
            return hashlib.sha256(file.expanduser().read_bytes()).hexdigest()
        except OSError as err:
            return f"unreadable: {err.strerror}"

    def _access_token(self) -> str:
        renew = "log in with the claude program, or configure api_key_env or api_key_file"
        try:
            value: Any = orjson.loads(self._file.read_bytes())
        except OSError as err:
            raise _expired(f"no login at {self._file} ({err.strerror}): {renew}") from err
        except orjson.JSONDecodeError as err:
            raise _expired(f"{self._file} is not JSON: {renew}") from err
        given: Any = cast("dict[str, Any]", value).get("claudeAiOauth") if isinstance(value, dict) else None
        login = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
        token, expires_ms = login.get("accessToken"), login.get("expiresAt")
        if not isinstance(token, str) or not token:
            raise _expired(f"no login in {self._file}: {renew}")
        if isinstance(expires_ms, int | float) and expires_ms <= time.time() * 1000:
            raise _expired(f"the login in {self._file} has expired: use the claude program once, or log in again")
        return token


def _expired(message: str) -> BackendError:
    return BackendError(message, code="auth_expired")
