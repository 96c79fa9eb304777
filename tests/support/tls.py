"""A certificate for servers on loopback that speak TLS, and what they are told of it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import quote


class Certificate:
    """Signs itself, so it is also the authority that clients are to trust."""

    def __init__(self, directory: Path) -> None:
        self.path, self.key = directory / "server.pem", directory / "server.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "2", "-subj", "/CN=promptmill", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*command, "-out", self.path, "-keyout", self.key], check=True, capture_output=True)

    @property
    def query(self) -> str:
        """The option of an address that makes a client trust it."""
        return f"ssl_ca_certs={quote(str(self.path), safe='')}"

    @property
    def directives(self) -> dict[str, str]:
        """What a Redis is told, also for its own connections to others; clients need no certificate."""
        return {
            "tls-cert-file": str(self.path),
            "tls-key-file": str(self.key),
            "tls-ca-cert-file": str(self.path),
            "tls-auth-clients": "no",
            "tls-replication": "yes",
        }

    def options(self, port: int) -> list[str]:
        """The same as words of a command line, with the port for TLS."""
        told = {"tls-port": str(port), **self.directives}
        return [word for name, value in told.items() for word in (f"--{name}", value)]
