"""Everything of a run that is a process or a network: store, broker, workers, relay, gateway, and who is between."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from ops.chaos.ledger import Ledger
from ops.chaos.options import Options
from ops.chaos.parts import EXIT_BROKEN, Part, listening, module
from ops.chaos.plan import MODELS, ROLES
from ops.chaos.proxy import Proxy
from tests.support.rabbit import rabbit_program, running_rabbit, steady_port
from tests.support.simulator import spawned_simulator
from tests.support.store import StoreServer

from promptmill.heartbeat import read_beats
from promptmill.settings import Settings, load_settings
from promptmill.store import Store

_READY_S: Final = 90.0
_PATHS: Final = {"local_openai": "/v1", "gemini_api": "/v1beta/openai"}
"""Where the simulator speaks each protocol."""


class Broker(Protocol):
    """A broker that a run may kill: see :mod:`tests.support.rabbit`."""

    @property
    def url(self) -> str: ...

    def kill(self) -> None: ...

    def start(self) -> None: ...


class System:
    """The parts of one run. Made by :func:`running_system`."""

    store: StoreServer
    broker: Broker | None = None
    simulator_url: str
    direct: Store
    """The harness's own way to the store, past every proxy."""
    settings: Settings
    """What the harness's own producer uses: its ways lead through proxies."""
    relay: Part
    gateway: Part

    def __init__(self, options: Options, directory: Path, ledger: Ledger, chance: random.Random) -> None:
        self.options = options
        self.directory = directory
        self.ledger = ledger
        self.proxies: list[Proxy] = []
        self.workers: list[Part] = []
        self.ports = {name: steady_port() for name in ("relay", "gateway")}
        self.config = directory / "chaos.toml"
        self.temporary = directory / "tmp"
        """Where the parts put temporary files; it must be empty at the end."""
        self._chance = chance
        self._lifeline = os.pipe()

    @property
    def broker_url(self) -> str:
        """Of the broker itself, past the proxies."""
        return self.broker.url if self.broker is not None else self.store.url

    async def ways(self, name: str) -> dict[str, str]:
        """Proxies to the store and the broker for one part, as settings that name them."""
        found = {"redis_url": await self._way(name, self.store.url)}
        if self.broker is not None:
            found["broker_url"] = await self._way(f"{name}-broker", self.broker.url)
        return found

    async def _way(self, name: str, url: str) -> str:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        proxy = Proxy(name, parts.hostname, parts.port, random.Random(self._chance.random()))
        await proxy.start()
        self.proxies.append(proxy)
        return url.replace(f":{parts.port}", f":{proxy.port}")

    async def part(self, name: str, *arguments: str) -> Part:
        """A started part of ours; its ways to the store and the broker are proxies of its own."""
        ways = {f"PROMPTMILL_{key.upper()}": url for key, url in (await self.ways(name)).items()}
        # No variable of ours decides where the parts put temporary files but this one.
        env = {**ways, "TMPDIR": str(self.temporary)}
        command = [*arguments, "--config", str(self.config)]
        log = self.directory / f"{name}.log"
        made = Part(name, module(*command), env, log, ledger=self.ledger, lifeline=self._lifeline[0])
        made.start()
        return made

    async def ready(self) -> None:
        """Until every worker can claim, and relay and gateway listen."""
        await asyncio.gather(listening(self.ports["relay"], self.relay), listening(self.ports["gateway"], self.gateway))
        async with asyncio.timeout(_READY_S):
            while True:
                beats, now_ms = await read_beats(self.direct)
                if sum(b.state == "ready" and b.fresh(now_ms) for b in beats) >= len(self.workers):
                    return
                await asyncio.sleep(0.1)

    @property
    def ours(self) -> list[Part]:
        """Workers first, so that they can drain while everything else is there."""
        return [*self.workers, self.relay, self.gateway]


def configuration(options: Options, simulator_url: str) -> str:
    """The configuration file of all parts; where the store is stands in their environment."""
    text = f"heartbeat_s = {options.heartbeat_s}\ndead_after_s = {options.dead_after_s}\n"
    text += f"concurrency = {options.concurrency}\nkeepalive_s = 3\ndrain_s = 30\nretry_ms = 100\n"
    for name, (kind, script) in MODELS.items():
        text += f'[models.{name}]\ntype = "{kind}"\napi_url = "{simulator_url}{_PATHS.get(kind, "")}"\n'
        text += f'model_name = "{script}"\nprice = {{ input = 1, output = 2 }}\n'
    for role, models in ROLES.items():
        slots = zip(("primary", "backup_1"), models, strict=True)
        text += f"[roles.{role}]\n" + "".join(f'{slot} = "{model}"\n' for slot, model in slots)
    return text


@asynccontextmanager
async def running_system(
    options: Options, directory: Path, ledger: Ledger, chance: random.Random
) -> AsyncGenerator[System]:
    """All parts, ready; they end with the block, whatever happens."""
    async with AsyncExitStack() as stack:
        system = System(options, directory, ledger, chance)
        system.temporary.mkdir()
        system.store = _store(directory)
        stack.callback(system.store.kill)
        await asyncio.to_thread(system.store.start)
        system.simulator_url = stack.enter_context(spawned_simulator()).url
        if options.broker == "amqp":
            if rabbit_program() is None:
                raise RuntimeError("rabbitmq-server is not installed: apt-get install rabbitmq-server")
            home = directory / "rabbit"
            home.mkdir()
            running = running_rabbit(home)
            system.broker = await asyncio.to_thread(stack.enter_context, running)
        system.direct = await Store.connect(system.store.url)
        stack.push_async_callback(system.direct.aclose)
        system.config.write_text(configuration(options, system.simulator_url))
        stack.push_async_callback(_close_proxies, system)
        system.settings = load_settings(system.config, **await system.ways("producer"))
        for n in range(options.workers):
            worker = await system.part(f"w{n}", "promptmill_workers", "--name", f"w{n}")
            if system.broker is not None:
                # The test's RabbitMQ waits 5 s for an acknowledgement, and Celery does not survive its complaint.
                worker.excused = frozenset({EXIT_BROKEN})
            system.workers.append(worker)
            stack.push_async_callback(system.workers[-1].stop)
        for name in ("relay", "gateway"):
            port = str(system.ports[name])
            setattr(system, name, await system.part(name, f"promptmill_{name}", "--port", port))
            stack.push_async_callback(getattr(system, name).stop)
        await system.ready()
        yield system


async def _close_proxies(system: System) -> None:
    for proxy in system.proxies:
        await proxy.aclose()


def _store(directory: Path) -> StoreServer:
    home = directory / "store"
    home.mkdir()
    server = StoreServer(home)
    # One that no outgoing connection can take while the store is down.
    server.port = steady_port()
    server.url = f"redis://127.0.0.1:{server.port}/0"
    return server
