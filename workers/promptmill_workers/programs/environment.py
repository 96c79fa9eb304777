"""What a program gets to know of the machine: an allow-list of the worker's environment, and private directories."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import Final

from promptmill.errors import ConfigError
from promptmill.settings.process import inherited

_ALLOWED: Final = frozenset(
    {"PATH", "LANG", "LANGUAGE", "TZ", "SSL_CERT_FILE", "SSL_CERT_DIR", "NODE_EXTRA_CA_CERTS"}
    | {case(name) for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY") for case in (str.upper, str.lower)}
)


def allowed() -> dict[str, str]:
    """What of this process's environment a program may see: search path, language, time zone, proxies, certificates."""
    return inherited(lambda name: name in _ALLOWED or name.startswith("LC_"))


def private(home: Path, tmp: Path) -> dict[str, str]:
    """The variables by which programs find where to write, all below one job's directories."""
    return {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "XDG_CACHE_HOME": str(home / ".cache"),
        "XDG_DATA_HOME": str(home / ".local" / "share"),
        "XDG_STATE_HOME": str(home / ".local" / "state"),
        "XDG_RUNTIME_DIR": str(tmp),
        "TMPDIR": str(tmp),
        "TMP": str(tmp),
        "TEMP": str(tmp),
        "TERM": "dumb",
    }


def jobs_root() -> str:
    """The directory of this user's jobs, made where it is not there, under the system's temporary one.

    Raises
    ------
    ConfigError
        It cannot be made, or is not this user's alone: whoever may write there could replace what programs read.
    """
    path = Path(tempfile.gettempdir()) / f"promptmill-{os.getuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
    except OSError as err:
        raise ConfigError(f"TMPDIR: cannot make {path}: {err.strerror}", field="TMPDIR") from err
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"TMPDIR: {path} must be a directory of this user's with mode 0700", field="TMPDIR")
    return str(path)
