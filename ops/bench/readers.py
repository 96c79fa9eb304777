"""``python -m ops.bench.readers``: what readers cost, and what it costs that there are none.

**Idle**: thousands of readers of as many jobs at one relay process: memory, and CPU while nothing happens. **All at
once**: as many readers of one job; the time from a message's publication until the last one has it. **Unread**: jobs
that stream while nobody reads, beside the same jobs with a reader each: what the store and the worker do a token.

The baseline is that of ``ops.bench.baseline``: a pub/sub connection a reader, one PUBLISH a token.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson
import redis.asyncio as aioredis
import uvloop
from ops.bench import proc_stats
from ops.bench.procs import Part, can_connect, free_port, start_valkey
from ops.bench.report import machine, number, table
from ops.bench.stats import median, percentile
from ops.bench.unread import Cost, unread

from promptmill import AsyncProducer, keys
from promptmill.contract import Progress, Token
from promptmill.settings import Settings
from promptmill.store import Claimed, Store, scripts

CONNECT_AT_ONCE: Final = 200
READY_S: Final = 180.0
FAN_OUT_S: Final = 30.0
HEADER: Final = ("", "baseline", "promptmill", "ratio")
MIB: Final = 1 << 20


@dataclass(kw_only=True)
class Figures:
    """What one system needed; NaN where it was not measured."""

    pss_kib: float = float("nan")
    """Of the relay, a reader."""
    store_kib: float = float("nan")
    """Of Redis, a reader."""
    idle_relay: float = float("nan")
    """Milliseconds of CPU a second."""
    idle_redis: float = float("nan")
    last_ms: list[float] = field(default_factory=list[float])
    """From publication until the last reader has it, for each message."""
    missed: int = 0
    deliver_us: float = float("nan")
    """CPU of relay and Redis for one message to one reader."""


class Crowd:
    """Readers that look at nothing but whether a token came, and when."""

    def __init__(self) -> None:
        self.heard = 0
        self.last_at = 0.0
        self._transports: list[asyncio.BaseTransport] = []

    async def open(self, port: int, paths: Sequence[str]) -> None:
        """Connect and ask; returns when every answer has begun."""
        loop = asyncio.get_running_loop()
        for start in range(0, len(paths), CONNECT_AT_ONCE):
            begun = [loop.create_future() for _ in paths[start : start + CONNECT_AT_ONCE]]
            for path, answer in zip(paths[start : start + CONNECT_AT_ONCE], begun, strict=True):
                transport, _ = await loop.create_connection(lambda a=answer: _Listener(self, a), "127.0.0.1", port)
                transport.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
                self._transports.append(transport)
            async with asyncio.timeout(READY_S):
                await asyncio.gather(*begun)

    async def close(self) -> None:
        for transport in self._transports:
            transport.close()
        self._transports.clear()
        await asyncio.sleep(1)  # the relay notices


class _Listener(asyncio.Protocol):
    def __init__(self, crowd: Crowd, begun: asyncio.Future[None]) -> None:
        self._crowd = crowd
        self._begun = begun

    def data_received(self, data: bytes) -> None:
        if not self._begun.done():
            if not data.startswith(b"HTTP/1.1 200 "):
                self._begun.set_exception(RuntimeError(f"answered {data[:200]!r}"))
            else:
                self._begun.set_result(None)
        if b"event: token" in data:
            self._crowd.heard += data.count(b"event: token")
            self._crowd.last_at = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._begun.done():
            self._begun.set_exception(exc or ConnectionResetError("closed before the answer"))


@dataclass(frozen=True)
class Relay:
    """A relay that runs: how its readers ask, and how a message is published for them."""

    port: int
    roots: dict[str, list[int]]
    paths: Callable[[int], Awaitable[list[str]]]
    """The addresses of so many jobs' streams."""
    publish: Callable[[str, int], Awaitable[None]]
    """Publish the n-th token of the job of an address."""
    subscribed: Callable[[Sequence[str]], Awaitable[bool]]
    """Whether all readers of these addresses would get a message."""


@contextmanager
def _relay_part(
    directory: Path, command: Sequence[str], port: int, env: dict[str, str], store: Part
) -> Generator[dict[str, list[int]]]:
    with Part("relay", command, directory=directory, env=env) as part:
        part.wait_until("a listening port", lambda: can_connect(port))
        yield {"relay": [part.pid], "redis": [store.pid]}


@asynccontextmanager
async def _promptmill(directory: Path, store_part: Part, url: str) -> AsyncGenerator[Relay]:
    port = free_port()
    command = [sys.executable, "-m", "promptmill_relay", "--port", str(port)]
    settings = Settings(redis_url=url, max_queued=0)
    claims: dict[str, tuple[str, int]] = {}
    store = await Store.connect(url)
    async with AsyncProducer(settings, store=store) as producer:

        async def paths(count: int) -> list[str]:
            jobs = await producer.submit_many([{"prompt": "x", "model": "echo"}] * count)
            return [f"/v1/jobs/{job.id}/stream" for job in jobs]

        async def publish(path: str, n: int) -> None:
            job_id = path.split("/")[3]
            if job_id not in claims:
                token = keys.new_token()
                claimed = await store.claim(job_id, token, "bench", Progress(phase="started"))
                if not isinstance(claimed, Claimed):
                    raise RuntimeError(f"not claimed: {claimed}")
                claims[job_id] = token, claimed.epoch
            token, epoch = claims[job_id]
            await store.run(scripts.APPEND, job_id, token, epoch, n + 1, Token(text="word ").to_json())

        async def subscribed(asked: Sequence[str]) -> bool:
            # A reader has its subscription before it reads the log, and has read it when it got its first event.
            names = {keys.channel(path.split("/")[3]) for path in asked}
            return await _subscribers(store.redis, names) == len(names)

        with _relay_part(directory, command, port, {"PROMPTMILL_REDIS_URL": url}, store_part) as roots:
            yield Relay(port, roots, paths, publish, subscribed)
    await store.aclose()


@asynccontextmanager
async def _baseline(directory: Path, store_part: Part, url: str) -> AsyncGenerator[Relay]:
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    command = [sys.executable, "-m", "uvicorn", "ops.bench.baseline.relay:app", *options]
    client: Any = aioredis.Redis.from_url(url)
    made = 0

    async def paths(count: int) -> list[str]:
        nonlocal made
        made += count
        return [f"/jobs/{made - n}/stream" for n in range(count)]

    async def publish(path: str, n: int) -> None:
        del n
        await client.publish(f"job:{path.split('/')[2]}", orjson.dumps({"type": "token", "text": "word "}))

    async def subscribed(asked: Sequence[str]) -> bool:
        return await _subscribers(client, {f"job:{path.split('/')[2]}" for path in asked}) == len(asked)

    with _relay_part(directory, command, port, {"BASELINE_REDIS_URL": url}, store_part) as roots:
        yield Relay(port, roots, paths, publish, subscribed)
    await client.aclose()


async def _subscribers(client: Any, names: set[str]) -> int:
    return sum(int(count) for _, count in await client.pubsub_numsub(*names))


async def _until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Until all are subscribed, but no longer: a busy baseline loses subscriptions, whose readers miss all."""
    with suppress(TimeoutError):
        async with asyncio.timeout(READY_S):
            await _held(condition)


async def _held(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 - other processes make it true
        await asyncio.sleep(0.2)


def _memory(relay: Relay, role: str) -> int:
    return proc_stats.memory(relay.roots, role)[1]


async def _measure_crowd(relay: Relay, readers: int, idle_s: float, messages: int) -> Figures:
    figures = Figures()
    warm = Crowd()
    paths = await relay.paths(10)
    await warm.open(relay.port, paths)
    await _until(lambda: relay.subscribed(paths))
    await warm.close()

    crowd, paths = Crowd(), await relay.paths(readers)
    relay_before, redis_before = _memory(relay, "relay"), _memory(relay, "redis")
    await crowd.open(relay.port, paths)
    await _until(lambda: relay.subscribed(paths))
    figures.pss_kib = (_memory(relay, "relay") - relay_before) / readers / 1024
    figures.store_kib = (_memory(relay, "redis") - redis_before) / readers / 1024
    await asyncio.sleep(2)
    before = proc_stats.cpu_seconds(relay.roots)
    started = time.monotonic()
    await asyncio.sleep(idle_s)
    after, took = proc_stats.cpu_seconds(relay.roots), time.monotonic() - started
    figures.idle_relay, figures.idle_redis = ((after[r] - before[r]) / took * 1000 for r in ("relay", "redis"))
    await crowd.close()

    crowd, paths = Crowd(), (await relay.paths(1)) * readers
    await crowd.open(relay.port, paths)
    await _until(lambda: relay.subscribed(paths))
    await _fan_out(relay, crowd, paths[0], 1, readers)
    before = proc_stats.cpu_seconds(relay.roots)
    for n in range(messages):
        missed, took_ms = await _fan_out(relay, crowd, paths[0], n + 2, readers)
        figures.missed += missed
        figures.last_ms.append(took_ms)
    after = proc_stats.cpu_seconds(relay.roots)
    spent = sum(after[role] - before[role] for role in ("relay", "redis"))
    figures.deliver_us = spent / (readers * messages) * 1e6
    await crowd.close()
    return figures


async def _fan_out(relay: Relay, crowd: Crowd, path: str, n: int, readers: int) -> tuple[int, float]:
    """Publish one message; answers how many did not get it, and the ms until the last one had it."""
    crowd.heard = 0
    started = time.monotonic()
    await relay.publish(path, n)
    while crowd.heard < readers and time.monotonic() - started < FAN_OUT_S:  # noqa: ASYNC110 - waking for each costs more
        await asyncio.sleep(0.005)
    return readers - crowd.heard, (crowd.last_at - started) * 1000


RELAYS: Final = {"baseline": _baseline, "promptmill": _promptmill}


def crowds(readers: int, idle_s: float, messages: int) -> dict[str, Figures]:
    """Both relays, one after the other, each with a store of its own."""
    found: dict[str, Figures] = {}
    for name, opened in RELAYS.items():
        print(f"{name}: {readers} readers", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="promptmill-bench-") as text:
            directory = Path(text)
            store, url = start_valkey(directory)

            async def measured(directory: Path = directory, store: Part = store, url: str = url) -> Figures:
                async with opened(directory, store, url) as relay:  # noqa: B023 - run before the loop goes on
                    return await _measure_crowd(relay, readers, idle_s, messages)

            with store:
                found[name] = uvloop.run(measured())
    return found


def _row(label: str, ours: float, theirs: float, digits: int) -> list[str]:
    ratio = number(ours / theirs, 2) if theirs else "-"
    return [label, number(theirs, digits), number(ours, digits), ratio]


def report(found: dict[str, Figures], costs: dict[str, dict[str, Cost]], readers: int, messages: int) -> str:
    """Both tables, and what was lost."""
    ours, theirs = found["promptmill"], found["baseline"]
    rows = [
        _row("relay's memory a reader, KiB", ours.pss_kib, theirs.pss_kib, 1),
        _row("Redis's memory a reader, KiB", ours.store_kib, theirs.store_kib, 1),
        _row("CPU of the relay while idle, ms/s", ours.idle_relay, theirs.idle_relay, 1),
        _row("CPU of Redis while idle, ms/s", ours.idle_redis, theirs.idle_redis, 1),
        _row("one message to all readers, median ms", median(ours.last_ms), median(theirs.last_ms), 0),
        _row(
            "one message to all readers, slowest ms",
            percentile(sorted(ours.last_ms), 100),
            percentile(sorted(theirs.last_ms), 100),
            0,
        ),
        _row("CPU of relay and Redis a delivery, µs", ours.deliver_us, theirs.deliver_us, 1),
        _row("deliveries missed", ours.missed, theirs.missed, 0),
    ]
    text = f"{readers:,} readers of one relay process; {messages} messages\n\n{table(HEADER, rows)}\n"
    rows = []
    for label, of in (
        ("CPU of the worker a token, µs", lambda c: c.worker_us),
        ("CPU of Redis a token, µs", lambda c: c.redis_us),
        ("commands in Redis a token, scripts' own included", lambda c: c.commands),
        ("writes of tokens (EVALSHA, PUBLISH) a token", lambda c: c.calls),
    ):
        for how in ("read", "unread"):
            theirs_, ours_ = of(costs["baseline"][how]), of(costs["promptmill"][how])
            rows.append(_row(f"{label}, {how}", ours_, theirs_, 2))
    return f"{text}\n{table(HEADER, rows)}\n"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m ops.bench.readers", description="What readers cost.")
    parser.add_argument("--readers", type=int, default=5000)
    parser.add_argument("--idle-s", type=float, default=45.0, help="more than two keepalives (default %(default)s)")
    parser.add_argument("--messages", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=100, help="of the unread ones (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rate", type=float, default=50.0)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < args.readers * 2 + 500:
        parser.error(f"{args.readers} readers need {args.readers * 2 + 500} open files; the limit is {hard}")
    found = crowds(args.readers, args.idle_s, args.messages)
    costs = unread(args.jobs, args.tokens, args.rate)
    print(machine())
    print()
    print(report(found, costs, args.readers, args.messages))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
