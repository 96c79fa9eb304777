"""A gateway or a relay in the test's own event loop, and one as a process."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx

from promptmill.settings import Settings
from promptmill.up.embedded import free_port
from promptmill_gateway.app import open_gateway
from promptmill_relay.app import open_relay
from promptmill_relay.server import OpenService, Service
from tests.support.web import serving

STARTED_S = 60.0


@dataclass(frozen=True)
class Front:
    """A server that runs: its port, a client of it, and what it serves."""

    port: int
    http: httpx.AsyncClient
    service: Service


@asynccontextmanager
async def running_gateway(settings: Settings, open_service: OpenService = open_gateway) -> AsyncGenerator[Front]:
    """A gateway until the block ends."""
    async with (
        open_service(settings) as service,
        serving(service.app, service.streams) as running,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.port}", timeout=60, trust_env=False) as http,
    ):
        yield Front(running.port, http, service)


@asynccontextmanager
async def running_relay(settings: Settings) -> AsyncGenerator[Front]:
    """A relay until the block ends."""
    async with running_gateway(settings, open_relay) as relay:
        yield relay


@asynccontextmanager
async def gateway_process(redis_url: str, **environment: str) -> AsyncGenerator[tuple[asyncio.subprocess.Process, int]]:
    """``python -m promptmill_gateway``, listening, and its port; killed at the end where it still runs."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "promptmill_gateway", "--port", str(port)),
        env={**os.environ, "PROMPTMILL_REDIS_URL": redis_url, **environment},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(STARTED_S):
            line = await process.stderr.readline()
            assert b"listens on" in line, line + await process.stderr.read()
        yield process, port
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
